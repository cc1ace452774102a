"""A drafter in a network of its own (a namespace and a cable), which drops every packet for a while."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
from asking import Case, Client, progressed, watching

from services.bench.delay import Relay
from services.cli.brokers import Brokers
from services.cli.stack import Stack


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Network:
    """A namespace and its cable to this one."""

    name: str
    cable: str
    here: str
    """Address of this end."""

    @property
    def under(self) -> tuple[str, ...]:
        """Runs a command in there."""
        return "ip", "netns", "exec", self.name

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
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
async def reachable(network: Network, brokers: Brokers, heartbeat_s: int) -> AsyncIterator[dict[str, str]]:
    """The brokers' addresses as a process in the network has them."""
    found = {}
    async with AsyncExitStack() as relays:
        for name, url in (("WISP_AMQP_URL", brokers.amqp_url), ("WISP_REDIS_URL", brokers.redis_url)):
            parts = urlsplit(url)
            assert parts.hostname is not None
            assert parts.port is not None
            relay = await relays.enter_async_context(Relay(parts.hostname, parts.port, 0.0, listen=network.here))
            user = parts.netloc.rpartition("@")[0]
            query = f"heartbeat={heartbeat_s}" if parts.scheme == "amqp" else ""
            found[name] = urlunsplit(parts._replace(netloc=f"{user}@{network.here}:{relay.port}", query=query))
        yield found


@pytest.mark.parametrize(
    ("cut_s", "heartbeat_s", "taken_over"),
    [(4.0, 10, False), (9.0, 2, True)],
    ids=["shorter than RabbitMQ waits", "so long that another drafter takes over"],
)
async def test_streams_outlive_a_network_that_drops_everything(
    brokers: Brokers,
    network: Network,
    target_folder: Path,
    cases: list[Case],
    cut_s: float,
    heartbeat_s: int,
    taken_over: bool,
) -> None:
    env = {"WISP_CACHE_TOKENS": "4096", "WISP_ADMISSION": "false"}
    async with (
        Stack("test-network", brokers=brokers, target=target_folder, drafters=0, env=env) as stack,
        reachable(network, brokers, heartbeat_s) as addresses,
        httpx.AsyncClient(timeout=120) as http,
        watching(stack) as seen,
    ):
        await stack.start("drafter", 1, addresses, network.under)
        client = Client(http, stack)
        streams = asyncio.create_task(client.ask_all(cases[:8], "lookup"))
        await progressed(seen, 12)
        network.cut()
        if taken_over:
            await stack.start("drafter")
        await asyncio.sleep(cut_s)
        assert taken_over or not streams.done(), "the cut must fall into the streams"
        network.mend()
        assert await streams == [case.tokens for case in cases[:8]]
        assert (len(seen.drafters) == 2) is taken_over
        assert await client.ask_all(cases[8:12], "none") == [case.tokens for case in cases[8:12]]
