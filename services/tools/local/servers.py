"""Private RabbitMQ and Redis servers, from installed programs, on free loopback ports."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_urlsafe

from services.tools.local.broker_check import NotReady, check_rabbitmq, check_redis, without_password
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.process import Process
from shared.errors import BrokersError

ATTEMPTS = 3
RABBITMQ_START_S = 90.0
REDIS_START_S = 20.0
STOP_GRACE_S = 10.0
LEAST_FREE_BYTES = 100_000_000
"""Room that a server needs on the disk for its data and logs."""
USER = "wisp"
PATHS = ("/usr/local/bin", "/opt/homebrew/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")

# Sized for a laptop: a small write-ahead log, and limits that a small disk does not exceed.
RABBITMQ_CONF = """\
listeners.tcp.1 = {host}:{port}
default_user = {user}
default_pass = {password}
vm_memory_high_watermark.absolute = 1GiB
disk_free_limit.absolute = 16MiB
raft.wal_max_size_bytes = 33554432
collect_statistics_interval = 60000
log.console = false
log.file.level = info
log.connection.level = warning
"""
REDIS_CONF = """\
bind {host}
port {port}
requirepass {password}
daemonize no
save ""
appendonly {persistent}
appendfsync always
dir "{folder}"
logfile ""
"""


@dataclass
class BrokerServer:
    """A running server that this process started. `processes` are in the order of stopping."""

    url: str
    processes: tuple[Process, ...]
    data: Path | None = None
    """Its data that survives a restart."""
    start_again: Callable[[], Awaitable[Process]] | None = None
    """Starts the first process again at the same address; returns when a client can log in."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The environment that its command-line tools need."""

    async def stop(self) -> None:
        """Stop its processes one after another."""
        for process in self.processes:
            await process.stop(grace_s=STOP_GRACE_S)

    async def kill(self) -> None:
        """Kill the server itself."""
        await self.processes[0].stop(signal.SIGKILL)

    async def restart(self, *, lose_data: bool = False) -> None:
        """Start the server again after `kill`, with or without its data. Raises BrokersError if it does not start."""
        if self.start_again is None:
            raise BrokersError(
                f"{without_password(self.url)} was not started from an installed program, so it cannot be restarted"
            )
        if lose_data and self.data is not None:
            shutil.rmtree(self.data, ignore_errors=True)
        self.processes = (await self.start_again(), *self.processes[1:])


def _ignore(_url: str) -> None:
    pass


async def start_rabbitmq(
    script: Path,
    epmd: Path,
    folder: Path,
    conf: str = "",
    *,
    advanced: str = "",
    launched: Callable[[str], None] = _ignore,
) -> BrokerServer:
    """Start RabbitMQ with all its files under `folder`; return when a client can log in.

    conf: further lines of configuration. advanced: content of advanced.config. launched: gets the URL, at which the
    server will answer, of each attempt. Raises BrokersError with the end of its log if it does not start.
    """
    plugins = few_plugins(script, folder / "plugins")

    def attempt(number: int) -> Awaitable[BrokerServer]:
        # A version that needs its plugins fails without them once, and gets them in the next attempt.
        shown = plugins if number == 1 else None
        return _rabbitmq(script, epmd, folder / f"rabbitmq-{number}", conf, advanced, shown, launched)

    return await with_fresh_ports(attempt)


def few_plugins(script: Path, folder: Path) -> Path | None:
    """Make a folder with links to RabbitMQ itself but to none of its plugins, and return it.

    At its start RabbitMQ compiles the configuration schemas of all plugins that it sees, enabled or not: a quarter of
    the time until it answers. Returns None for an installation with another layout.
    """
    found = [
        path for name in ("rabbit", "rabbit_common") for path in script.resolve().parents[1].glob(f"plugins/{name}-*")
    ]
    if len(found) != 2 or not all(path.is_dir() for path in found):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        link = folder / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    return folder


async def start_redis(
    binary: Path,
    folder: Path,
    conf: str = "",
    *,
    persistent: bool = False,
    launched: Callable[[str], None] = _ignore,
) -> BrokerServer:
    """Start Redis with all its files under `folder`; return when it answers.

    conf: further lines of configuration. persistent: acknowledged writes are on disk; otherwise the data ends with the
    server. launched: as for RabbitMQ. Raises BrokersError.
    """
    return await with_fresh_ports(
        lambda attempt: _redis(binary, folder / f"redis-{attempt}", conf, persistent, launched)
    )


async def with_fresh_ports(start: Callable[[int], Awaitable[BrokerServer]]) -> BrokerServer:
    """Retry if the server ends by itself: another process may have taken a port."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await start(attempt)
        except EndedEarly:
            continue
    return await start(ATTEMPTS)


class EndedEarly(BrokersError):
    """A server ended before it was ready."""


async def _rabbitmq(
    script: Path,
    epmd: Path,
    folder: Path,
    conf: str,
    advanced: str,
    plugins: Path | None,
    launched: Callable[[str], None],
) -> BrokerServer:
    port, distribution_port, epmd_port = free_ports(3)
    password = token_urlsafe(12)
    own = RABBITMQ_CONF.format(host=LOOPBACK, port=port, user=USER, password=password)
    _write(folder, "rabbitmq.conf", own + conf)
    if advanced:
        _write(folder, "advanced.config", advanced + "\n")
    _write(folder, "enabled_plugins", "[].\n")
    environment = _erlang_environment(epmd, folder, plugins, port, distribution_port, epmd_port)
    # A private port mapper: one that RabbitMQ starts would outlive it.
    mapper = await Process.start(
        "epmd",
        [str(epmd), "-port", str(epmd_port), "-address", LOOPBACK],
        log=folder / "epmd.log",
        environment=environment,
    )
    url = f"amqp://{USER}:{password}@{LOOPBACK}:{port}/"

    async def start() -> Process:
        broker = await Process.start(
            "rabbitmq", [str(script), "-noinput"], log=folder / "console.log", environment=environment, folder=folder
        )
        launched(url)
        return await _ready(broker, lambda: check_rabbitmq(url), folder / "rabbitmq.log", RABBITMQ_START_S)

    try:
        broker = await start()
    except BaseException:
        await asyncio.shield(kill(mapper))
        raise
    return BrokerServer(url, (broker, mapper), folder / "data", start, environment)


def _erlang_environment(
    epmd: Path, folder: Path, plugins: Path | None, port: int, distribution_port: int, epmd_port: int
) -> dict[str, str]:
    """Return the environment of a RabbitMQ whose files are all in its folder."""
    schedulers = min(2, os.cpu_count() or 1)
    environment = {
        "PATH": os.pathsep.join([str(epmd.parent), *PATHS]),
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": LOOPBACK,
        "ERL_CRASH_DUMP_SECONDS": "0",
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_NODENAME": "wisp@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_LOGS": str(folder / "rabbitmq.log"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_PID_FILE": str(folder / "rabbitmq.pid"),
        # Unbound schedulers: several private servers share the cores.
        "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"+S {schedulers}:{schedulers} "
        "-kernel inet_dist_use_interface {127,0,0,1}",
    }
    if plugins is not None:
        environment["RABBITMQ_PLUGINS_DIR"] = str(plugins)
    return environment


async def _redis(
    binary: Path, folder: Path, more: str, persistent: bool, launched: Callable[[str], None]
) -> BrokerServer:
    (port,) = free_ports(1)
    password = token_urlsafe(12)
    fields = {"host": LOOPBACK, "port": port, "password": password, "folder": folder}
    own = REDIS_CONF.format(**fields, persistent="yes" if persistent else "no")
    conf = _write(folder, "redis.conf", own + more)
    url = f"redis://:{password}@{LOOPBACK}:{port}/0"

    async def start() -> Process:
        server = await Process.start(
            "redis", [str(binary), str(conf)], log=folder / "redis.log", environment={"LANG": "C.UTF-8"}, folder=folder
        )
        launched(url)
        return await _ready(server, lambda: check_redis(url), server.log, REDIS_START_S)

    return BrokerServer(url, (await start(),), folder / "appendonlydir", start)


async def _ready(process: Process, check: Callable[[], Awaitable[str]], log: Path, timeout_s: float) -> Process:
    """Return the process once it answers; kill it if it does not."""
    try:
        await until_ready(check, process, log, timeout_s)
    except BaseException:
        await asyncio.shield(kill(process))
        raise
    return process


def _write(folder: Path, name: str, text: str) -> Path:
    """Write a file that only this user can read, because it may hold a password."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    path.touch(0o600)
    path.write_text(text)
    return path


async def until_ready(check: Callable[[], Awaitable[str]], process: Process, log: Path, timeout_s: float) -> None:
    """Poll `check` until it succeeds. Raises BrokersError if the process ends or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await check()
                except NotReady:
                    if not process.alive:
                        shown = f"{_tail(log)}\n{process.tail()}"
                        raise EndedEarly(
                            f"{process.name} ended with status {process.returncode} before it was ready:\n{shown}\n"
                            + advice(shown, log, _free_bytes(log), ended=True)
                        ) from None
                    await asyncio.sleep(0.05)
                else:
                    return
    except TimeoutError:
        raise BrokersError(
            f"{process.name} was not ready within {timeout_s:.0f} s; the end of its log:\n{_tail(log)}\n"
            + advice(_tail(log), log, _free_bytes(log), ended=False)
        ) from None


def advice(shown: str, log: Path, free_bytes: int, *, ended: bool) -> str:
    """Return what to do about a server that does not start.

    shown: the end of its output. free_bytes: of the disk. ended: it has ended, instead of not answering.
    """
    words = shown.lower()
    causes = {
        "a port was taken by another program meanwhile: try again": ("eaddrinuse", "address already in use"),
        f"the disk is full: free some space at {log.parent}": ("enospc", "no space left"),
        f"files cannot be written at {log.parent}: give this user the folder": ("eacces", "permission denied"),
        "memory is short: close other programs": ("enomem", "cannot allocate memory", "eheap_alloc", "out of memory"),
        "its installation is damaged: install it again": ("exec format error", "cannot open shared object"),
    }
    found = [what for what, signs in causes.items() if any(sign in words for sign in signs)]
    if free_bytes < LEAST_FREE_BYTES and not any("disk" in what for what in found):
        found.append(f"the disk has only {free_bytes / 1e6:.0f} MB left: free some space at {log.parent}")
    unknown = (
        "its last lines above say why it ended"
        if ended
        else "the machine may be too busy: close other programs, and try again"
    )
    likely = "; ".join(found) or unknown
    return (
        f"→ {likely[0].upper()}{likely[1:]}. Or use servers that run already: set WISP_AMQP_URL and WISP_REDIS_URL. "
        f"Its log: {log}"
    )


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free


async def kill(*processes: Process | None) -> None:
    """Kill the started processes of a server."""
    for process in processes:
        if process is not None:
            await process.stop(signal.SIGKILL)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.is_file() else ""
