"""A gateway under overload: a thousand streams at once, and many clients leaving at once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil
import pytest
from gateway_peer import Peer, Script, eventually
from gateway_suite import HEADERS, MODEL, free_port
from patience import HANG_S

from shared.models.folder import ModelFolder

STREAMS = 1000
WAVE = 250
"""Streams that are opened at once."""
MOST_BYTES = 300e6
"""Limit of the gateway's memory with all streams; without streams it uses 80 MB."""


@dataclass
class Gateway:
    """A gateway's process beside its peer, with raw streams instead of a client library."""

    process: psutil.Process
    port: int
    peer: Peer

    async def open(self, prompt: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 64, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\n{HEADERS}connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        return reader, writer

    async def answer(self, prompt: str) -> tuple[int, str]:
        """Return the status and text of a stream."""
        reader, writer = await self.open(prompt)
        received = (await reader.read()).decode()
        writer.close()
        lines = [line.removeprefix("data: ") for line in received.split("\n") if line.startswith("data: {")]
        text = "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])
        return int(received.split(" ")[1]), text


@pytest.fixture
async def gateway(amqp_url: str, redis_url: str, namespace: str, target: ModelFolder) -> AsyncIterator[Gateway]:
    port = free_port()
    environment = os.environ | {"WISP_AMQP_URL": amqp_url, "WISP_REDIS_URL": redis_url, "WISP_NAMESPACE": namespace}
    environment |= {"WISP_TARGET": str(target.path), "WISP_MAX_SESSIONS": str(STREAMS), "WISP_LOG_LEVEL": "error"}
    async with Peer.run(amqp_url, redis_url, namespace, target) as peer:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway", "--port", str(port), env=environment
        )
        try:
            one = Gateway(psutil.Process(child.pid), port, peer)
            async with asyncio.timeout(HANG_S):
                while not await _listens(port):  # noqa: ASYNC110 - the process gives no signal
                    await asyncio.sleep(0.05)
            yield one
        finally:
            child.terminate()
            await child.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_a_thousand_streams_fit_in_bounded_memory_and_more_are_refused(
    gateway: Gateway,
) -> None:
    gateway.peer.script = Script(text="all of it", round_len=3)
    held = gateway.peer.held = asyncio.Event()
    asked: list[asyncio.Task[tuple[int, str]]] = []
    async with asyncio.timeout(HANG_S):
        while len(asked) < STREAMS:
            # In waves: on a slow disk RabbitMQ takes longer than a publish may last to confirm a thousand at once.
            wave = range(len(asked), len(asked) + WAVE)
            asked += [asyncio.create_task(gateway.answer(f"prompt {number}")) for number in wave]
            while len(gateway.peer.generated) < len(asked):
                assert not [task.result() for task in asked if task.done()]
                await asyncio.sleep(0.05)
    assert (await gateway.answer("one too many"))[0] == 429
    assert gateway.process.memory_info().rss < MOST_BYTES
    held.set()
    async with asyncio.timeout(HANG_S):
        assert set(await asyncio.gather(*asked)) == {(200, "all of it")}
    # In this crowd the gateway may have missed the heartbeats of its peer.
    async with asyncio.timeout(HANG_S):
        while (await gateway.answer("again"))[0] != 200:  # noqa: ASYNC110 - the gateway gives no signal
            await asyncio.sleep(0.5)
    assert gateway.process.memory_info().rss < MOST_BYTES


async def test_a_storm_of_cancels_leaves_other_streams_intact(gateway: Gateway) -> None:
    gateway.peer.script = Script(text="x" * 40, round_len=1, pause_s=0.2)
    stays = asyncio.create_task(gateway.answer("stays"))
    await eventually(lambda: len(gateway.peer.generated) == 1)
    # Slow answers, so that this process has time for the cancels.
    gateway.peer.script = Script(text="x" * 60, round_len=1, pause_s=2.0)
    leaving = [await gateway.open(f"leaves {number}") for number in range(300)]
    await eventually(lambda: len(gateway.peer.generated) == 301)
    for _, writer in leaving:
        writer.transport.abort()
    await eventually(lambda: len(gateway.peer.refused) == 300)
    assert gateway.peer.generated[0].session not in gateway.peer.refused
    await eventually(lambda: sorted(gateway.peer.cancelled) == sorted(gateway.peer.refused))
    assert await stays == (200, "x" * 40)
