"""Connections to a server that hangs end after a while; others stay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from patience import HANG_S
from yarl import URL

from shared.broker import silence
from shared.broker.silence import ImpatientTransports

LONGEST_S = 1.2
"""Silence that is allowed in these tests: a heartbeat and the grace."""
Say = Callable[[asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "GRACE_S", LONGEST_S - 1)
    monkeypatch.setattr(silence, "TICK_S", 0.1)


@asynccontextmanager
async def connected(say: Say, heartbeat_s: int = 1) -> AsyncIterator[asyncio.StreamReader]:
    """Yield what a client reads from a server that says this and then hangs."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await say(writer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = URL(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/?heartbeat={heartbeat_s}")
    reader, writer = await ImpatientTransports().create(url, ssl_context_provider=None)
    yield reader
    writer.transport.abort()
    server.close()


async def ended_after_s(reader: asyncio.StreamReader, longest_s: float) -> float | None:
    """Read until the connection ends, and return the time; None if it has not ended in `longest_s`."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(longest_s):
            while True:
                await reader.readexactly(1)
    except asyncio.IncompleteReadError:
        return time.monotonic() - started
    except TimeoutError:
        return None


async def nothing(writer: asyncio.StreamWriter) -> None:
    """Say nothing."""


async def something(writer: asyncio.StreamWriter) -> None:
    for _ in range(10):
        writer.write(b"x")
        await asyncio.sleep(0.4)


async def test_a_silent_server_is_given_up() -> None:
    async with connected(nothing) as reader:
        after_s = await ended_after_s(reader, HANG_S)
    assert after_s is not None
    assert after_s >= LONGEST_S


async def test_a_server_that_sends_now_and_then_keeps_its_connection() -> None:
    async with connected(something) as reader:
        assert await ended_after_s(reader, 2 * LONGEST_S) is None


async def test_without_heartbeats_silence_is_normal() -> None:
    async with connected(nothing, heartbeat_s=0) as reader:
        assert await ended_after_s(reader, 2 * LONGEST_S) is None


async def test_a_client_that_does_not_read_keeps_its_connection() -> None:
    async with connected(nothing) as reader:
        await asyncio.sleep(2 * LONGEST_S)
        assert await ended_after_s(reader, LONGEST_S / 2) is None


async def test_time_in_which_the_client_stands_still_is_no_silence() -> None:
    async with connected(nothing) as reader:
        reading = asyncio.create_task(ended_after_s(reader, HANG_S))
        await asyncio.sleep(0.2)
        time.sleep(2 * LONGEST_S)  # noqa: ASYNC251 the event loop itself stands still
        await asyncio.sleep(LONGEST_S / 3)
        assert not reading.done()
        reading.cancel()
