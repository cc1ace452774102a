"""The suite that takes the faults: two processes of each service, private brokers, and relays before RabbitMQ.

Brokers can be killed and restarted, with or without their data; the relays can be cut, held and slowed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from services.tools.bench.support.relay import DelayRelay
from services.tools.local.brokers import Brokers
from services.tools.local.folder import RunFolder
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.process import Process
from services.tools.local.progress import Progress
from services.tools.local.servers import BrokerServer
from services.tools.local.settings import BrokerAddresses
from services.tools.local.stack import Stack
from shared.errors import BrokersError

COUNTS = {"scheduler": 2, "estimator": 2, "verifier": 2, "drafter": 2, "gateway": 2}
LINKED = ("drafter", "verifier")
"""Services whose processes each reach RabbitMQ through a relay of their own."""
CONTROL_S = 120.0
STARTS = 5
"""Starts of a process, of which all but one may end because a broker is away for longer than a service waits."""
MOST_APART_S = 10**7
"""Largest offset of a process's monotonic clock: the clocks of two hosts differ by their uptimes."""


class ChaosSite:
    """A suite with its brokers and relays, as targets of faults. `open` starts it."""

    def __init__(
        self, brokers: Brokers, stack: Stack, env_of: Mapping[str, Mapping[str, str]], clocks: random.Random | None
    ) -> None:
        """clocks: draws an offset for each process's clock; None leaves all clocks alike."""
        self.brokers = brokers
        self.stack = stack
        self.metrics: dict[int, int] = {}
        """Metrics port by process id."""
        self.links: dict[int, DelayRelay] = {}
        """Relay by process id."""
        self._ready: set[int] = set()
        self._env_of = env_of
        self._clocks = clocks
        self._open = AsyncExitStack()
        self.rabbitmq, self.redis = _servers(brokers)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        target: Path,
        *,
        env: Mapping[str, str] | None = None,
        env_of: Mapping[str, Mapping[str, str]] | None = None,
        counts: Mapping[str, int] = COUNTS,
        progress: Progress | None = None,
        clocks: int = 0,
    ) -> AsyncIterator[ChaosSite]:
        """Start brokers and services; yield when all are ready. `clocks` is the seed of the processes' clocks."""
        with RunFolder("chaos") as folder:
            none = BrokerAddresses(amqp_url=None, redis_url=None)
            async with Brokers(folder.path, addresses=none, persistent=True, progress=progress) as brokers:
                stack = Stack(
                    "chaos-services",
                    brokers=brokers,
                    target=target,
                    env=env,
                    progress=progress,
                    **{f"{service}s": 0 for service in counts},  # type: ignore[arg-type]
                )
                async with stack:
                    site = cls(brokers, stack, env_of or {}, random.Random(clocks) if await clocks_differ() else None)
                    async with site._open:
                        # The gateway becomes ready only after a verifier.
                        others = [service for service in counts if service != "gateway"]
                        await asyncio.gather(*(site.start(service, counts[service]) for service in others))
                        await site.start("gateway", counts.get("gateway", 0))
                        yield site

    async def start(self, service: str, count: int = 1) -> list[Process]:
        """Start processes of a service; return when they are ready."""
        return list(await asyncio.gather(*(self._start_one(service) for _ in range(count))))

    async def _start_one(self, service: str) -> Process:
        env = dict(self._env_of.get(service, {}))
        relay = None
        if service in LINKED:
            relay, env["WISP_AMQP_URL"] = await self._link()
        if service != "gateway":
            (port,) = free_ports(1)
            env["WISP_METRICS_PORT"] = str(port)
        under: tuple[str, ...] = ()
        if self._clocks is not None:
            under = ("unshare", "--time", "--monotonic", str(self._clocks.randrange(MOST_APART_S)))
        (process,) = await self.stack.start(service, 1, env, under, STARTS)
        if relay is not None:
            self.links[process.pid] = relay
        if service != "gateway":
            self.metrics[process.pid] = port
        self._ready.add(process.pid)
        return process

    def ready(self, service: str) -> list[Process]:
        """Return the running processes of a service that have been ready."""
        return [process for process in self.stack.processes(service) if process.pid in self._ready]

    async def _link(self) -> tuple[DelayRelay, str]:
        parts = urlsplit(self.brokers.amqp_url)
        assert parts.hostname is not None
        assert parts.port is not None
        relay = await self._open.enter_async_context(DelayRelay(parts.hostname, parts.port, 0.0))
        user = parts.netloc.rpartition("@")[0]
        return relay, urlunsplit(parts._replace(netloc=f"{user}@{LOOPBACK}:{relay.port}"))

    def urls(self) -> list[str]:
        """Return the base URLs of the running gateways that have been ready."""
        return self.stack.urls

    async def control_rabbitmq(self, *words: str) -> str:
        """Run `rabbitmqctl` and return its output. Raises BrokersError."""
        environment = dict(self.rabbitmq.environment)
        script = await asyncio.to_thread(_control_script, self.brokers)
        child = await asyncio.create_subprocess_exec(
            str(script), *words, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(CONTROL_S):
                output, _ = await child.communicate()
        except TimeoutError:
            child.kill()
            await child.wait()
            raise BrokersError(f"rabbitmqctl {' '.join(words)} did not end in {CONTROL_S:g} s") from None
        if child.returncode:
            raise BrokersError(f"rabbitmqctl {' '.join(words)}: {output.decode(errors='replace')[-500:]}")
        return output.decode()


async def clocks_differ() -> bool:
    """Return whether processes can have clocks of their own (time namespaces need Linux and root)."""
    try:
        child = await asyncio.create_subprocess_exec(
            *("unshare", "--time", "--monotonic", "1", "true"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return False
    return await child.wait() == 0


def _servers(brokers: Brokers) -> tuple[BrokerServer, BrokerServer]:
    found = {server.url.partition("://")[0]: server for server in brokers.servers}
    if "amqp" not in found or "redis" not in found or any(s.start_again is None for s in found.values()):
        raise BrokersError(
            "RabbitMQ and Redis must be installed on this machine, to be killed and restarted; "
            "`wisp doctor` lists what is installed"
        )
    return found["amqp"], found["redis"]


def _control_script(brokers: Brokers) -> Path:
    from services.tools.local.machine import inspect_machine

    script = inspect_machine().rabbitmq
    assert script is not None
    return script.with_name("rabbitmqctl")
