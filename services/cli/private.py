"""Private RabbitMQ and Redis servers, started from installed programs on loopback ports of their own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe

from services.cli import probe
from services.cli.ports import LOOPBACK, free_ports
from services.cli.process import Process
from shared.errors import BrokersError

ATTEMPTS = 3
RABBITMQ_START_S = 90.0
REDIS_START_S = 20.0
STOP_GRACE_S = 10.0
USER = "wisp"
PATHS = ("/usr/local/bin", "/opt/homebrew/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")

# Sized for a laptop: no plugins, small write-ahead log, and alarms that a small disk does not raise.
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
appendonly no
dir "{folder}"
logfile ""
"""


@dataclass(frozen=True)
class Server:
    """A running private server: its URL and its processes, the one to stop first coming first."""

    url: str
    processes: tuple[Process, ...]

    async def stop(self) -> None:
        """Stop its processes one after the other."""
        for process in self.processes:
            await process.stop(grace_s=STOP_GRACE_S)


async def start_rabbitmq(script: Path, epmd: Path, folder: Path, conf: str = "") -> Server:
    """Start RabbitMQ with everything it writes under `folder`; ready when a client can log in.

    conf: further lines of its configuration. Raises BrokersError, with the end of its log, when it does not come up.
    """
    return await with_fresh_ports(lambda attempt: _rabbitmq(script, epmd, folder / f"rabbitmq-{attempt}", conf))


async def start_redis(binary: Path, folder: Path, conf: str = "") -> Server:
    """Start Redis without persistence under `folder`; ready when it answers. conf: as above. Raises BrokersError."""
    return await with_fresh_ports(lambda attempt: _redis(binary, folder / f"redis-{attempt}", conf))


async def with_fresh_ports(start: Callable[[int], Awaitable[Server]]) -> Server:
    """Try again when the server ended by itself: another process may have taken a port meanwhile."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await start(attempt)
        except EndedEarly:
            continue
    return await start(ATTEMPTS)


class EndedEarly(BrokersError):
    """A server ended before it was ready."""


async def _rabbitmq(script: Path, epmd: Path, folder: Path, conf: str) -> Server:
    port, distribution_port, epmd_port = free_ports(3)
    password = token_urlsafe(12)
    own = RABBITMQ_CONF.format(host=LOOPBACK, port=port, user=USER, password=password)
    _write(folder, "rabbitmq.conf", own + conf)
    _write(folder, "enabled_plugins", "[].\n")
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
    # A port mapper of its own: RabbitMQ would start one that outlives it.
    mapper = await Process.start(
        "epmd",
        [str(epmd), "-port", str(epmd_port), "-address", LOOPBACK],
        log=folder / "epmd.log",
        environment=environment,
    )
    broker = None
    url = f"amqp://{USER}:{password}@{LOOPBACK}:{port}/"
    try:
        broker = await Process.start(
            "rabbitmq", [str(script), "-noinput"], log=folder / "console.log", environment=environment, folder=folder
        )
        await until_ready(lambda: probe.rabbitmq(url), broker, folder / "rabbitmq.log", RABBITMQ_START_S)
    except BaseException:
        await asyncio.shield(kill(broker, mapper))
        raise
    return Server(url, (broker, mapper))


async def _redis(binary: Path, folder: Path, more: str) -> Server:
    (port,) = free_ports(1)
    password = token_urlsafe(12)
    own = REDIS_CONF.format(host=LOOPBACK, port=port, password=password, folder=folder)
    conf = _write(folder, "redis.conf", own + more)
    server = await Process.start(
        "redis", [str(binary), str(conf)], log=folder / "redis.log", environment={"LANG": "C.UTF-8"}, folder=folder
    )
    url = f"redis://:{password}@{LOOPBACK}:{port}/0"
    try:
        await until_ready(lambda: probe.redis_server(url), server, server.log, REDIS_START_S)
    except BaseException:
        await asyncio.shield(kill(server))
        raise
    return Server(url, (server,))


def _write(folder: Path, name: str, text: str) -> Path:
    """Write a file that only this user may read: it may hold a password."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    path.touch(0o600)
    path.write_text(text)
    return path


async def until_ready(check: Callable[[], Awaitable[str]], process: Process, log: Path, timeout_s: float) -> None:
    """Ask until `check` succeeds. Raises BrokersError when the process ends or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await check()
                except probe.NotReady:
                    if not process.alive:
                        raise EndedEarly(
                            f"{process.name} ended with status {process.returncode} before it was ready:\n"
                            f"{_tail(log)}\n{process.tail()}"
                        ) from None
                    await asyncio.sleep(0.05)
                else:
                    return
    except TimeoutError:
        raise BrokersError(
            f"{process.name} was not ready within {timeout_s:.0f} s; the end of its log ({log}):\n{_tail(log)}"
        ) from None


async def kill(*processes: Process | None) -> None:
    """Kill what has been started of a server."""
    for process in processes:
        if process is not None:
            await process.stop(signal.SIGKILL)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.is_file() else ""
