"""Another process takes over from a frozen scheduler or a drafter without a network, and its return does no harm.

With a tiny model."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from secrets import token_hex
from urllib.parse import urlsplit, urlunsplit

import pytest
from asking import Traffic, progressed, watching

from services.tools.bench.support.relay import DelayRelay
from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos.client import ChaosClient
from services.tools.chaos.core.requests import ChaosRequest, Manner, load
from services.tools.chaos.core.verdicts import RequestVerdict
from services.tools.chaos.reference import References
from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack

TOKENS = 120
HEARTBEAT_S = 1
"""RabbitMQ drops a connection without traffic for two of these."""


@dataclass
class Suite:
    """A stack, its traffic, and a client."""

    stack: Stack
    seen: Traffic
    client: ChaosClient
    requests: list[ChaosRequest]

    def ask(self, draft: str = "auto") -> asyncio.Task[set[RequestVerdict]]:
        """Send every request at once; return the completions."""

        async def all_of_them() -> set[RequestVerdict]:
            asked = [replace(request, draft=draft) for request in self.requests]
            return {outcome.verdict for outcome in await asyncio.gather(*map(self.client.ask, asked))}

        self.seen.clear()
        return asyncio.create_task(all_of_them())


@pytest.fixture(scope="module")
async def suite(brokers: Brokers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    folder = tiny_model(tmp_path_factory.mktemp("takeover") / "tiny")
    asked = load(7, questions=6, longest=TOKENS)
    references = References(folder, asked.questions, TOKENS)
    requests = [replace(asked.request(0, n), manner=Manner.STREAM, max_tokens=TOKENS) for n in range(12)]
    async with (
        Stack(
            "takeover",
            brokers=brokers,
            target=folder,
            schedulers=2,
            env={"WISP_THREADS": "1", "WISP_ADMISSION": "false"},
            env_of={
                # Drafters take over from each other here: test_no_drafter.py has schedulers that stand in for them.
                "scheduler": {
                    "WISP_AMQP_URL": f"{brokers.amqp_url}?heartbeat={HEARTBEAT_S}",
                    "WISP_STAND_IN_POOLS": "[]",
                    # In runs a session goes on without its drafter: test_exactness_runs.py and others.
                    "WISP_WITHOUT": '["runs"]',
                },
                "verifier": {"WISP_PROFILE": "false"},
            },
        ) as stack,
        watching(stack) as seen,
    ):
        yield Suite(stack, seen, ChaosClient(folder.name, lambda: stack.urls, references), requests)


async def test_a_standby_takes_over_from_a_frozen_scheduler(suite: Suite) -> None:
    asking = suite.ask()
    await progressed(suite.seen, 10)
    (name,) = suite.seen.schedulers
    (frozen,) = [process for process in suite.stack.processes("scheduler") if process.name == name]
    frozen.send(signal.SIGSTOP)
    try:
        assert not asking.done(), "it must freeze while there is work"
        assert await asking == {RequestVerdict.RIGHT}
        assert len(suite.seen.schedulers) == 2
        more = suite.ask()
        await progressed(suite.seen, 10)
    finally:
        frozen.send(signal.SIGCONT)
    assert await more == {RequestVerdict.RIGHT}
    assert frozen.alive
    assert await suite.ask() == {RequestVerdict.RIGHT}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def tc(*words: str) -> None:
    subprocess.run(["tc", "qdisc", *words], check=True, capture_output=True)


@dataclass
class Network:
    """A network namespace and its link to this one."""

    name: str
    cable: str
    here: str
    """Address of this end."""

    @property
    def under(self) -> Sequence[str]:
        """Return a command line that runs a command in the namespace."""
        return "ip", "netns", "exec", self.name

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Limit incoming traffic to the speed of an old telephone line."""
        tc("add", "dev", self.cable, "root", "tbf", *["rate", "256kbit", "burst", "8kb", "latency", "400ms"])
        yield
        tc("del", "dev", self.cable, "root")


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root and iproute2, to make a network namespace")
    tag = token_hex(3)
    subnet = f"10.231.{random.randrange(256)}"
    made = Network(f"wisp-{tag}", f"wisp{tag}a", f"{subnet}.1")
    ip("netns", "add", made.name)
    try:
        ip("link", "add", made.cable, "type", "veth", "peer", "name", f"wisp{tag}b", "netns", made.name)
        ip("addr", "add", f"{subnet}.1/30", "dev", made.cable)
        ip("-n", made.name, "addr", "add", f"{subnet}.2/30", "dev", f"wisp{tag}b")
        ip("-n", made.name, "link", "set", f"wisp{tag}b", "up")
        made.mend()
        yield made
    finally:
        ip("netns", "del", made.name)


@asynccontextmanager
async def reachable(network: Network, brokers: Brokers) -> AsyncIterator[dict[str, str]]:
    """Return the brokers' addresses for a process in the namespace."""
    found = {}
    async with AsyncExitStack() as relays:
        for name, url in (("WISP_AMQP_URL", brokers.amqp_url), ("WISP_REDIS_URL", brokers.redis_url)):
            parts = urlsplit(url)
            assert parts.hostname is not None
            assert parts.port is not None
            relay = await relays.enter_async_context(DelayRelay(parts.hostname, parts.port, 0.0, listen=network.here))
            user = parts.netloc.rpartition("@")[0]
            query = f"heartbeat={HEARTBEAT_S}" if parts.scheme == "amqp" else ""
            found[name] = urlunsplit(parts._replace(netloc=f"{user}@{network.here}:{relay.port}", query=query))
        yield found


async def test_a_drafter_behind_a_slow_network_that_then_drops_everything(
    suite: Suite, brokers: Brokers, network: Network
) -> None:
    stack = suite.stack
    async with reachable(network, brokers) as addresses:
        (near,) = stack.processes("drafter")
        (far,) = await stack.start("drafter", 1, addresses, network.under)
        await stack.stop(near)
        with network.slow():
            assert await suite.ask("lookup") == {RequestVerdict.RIGHT}
        assert suite.seen.drafters == {far.name}
        # Shorter than RabbitMQ waits: late, by the same drafter.
        asking = suite.ask("lookup")
        await progressed(suite.seen, 10)
        network.cut()
        await asyncio.sleep(HEARTBEAT_S)
        assert not asking.done(), "the cut must fall into the streams"
        network.mend()
        assert await asking == {RequestVerdict.RIGHT}
        assert suite.seen.drafters == {far.name}
        # So long that another one takes over.
        asking = suite.ask("lookup")
        await progressed(suite.seen, 10)
        network.cut()
        (near,) = await stack.start("drafter")
        assert await asking == {RequestVerdict.RIGHT}
        assert suite.seen.drafters == {far.name, near.name}
        network.mend()
        assert await suite.ask() == {RequestVerdict.RIGHT}
        await stack.stop(far)
