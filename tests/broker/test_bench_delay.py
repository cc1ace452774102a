"""The delaying relay: every byte arrives late, none is lost or out of order, and ends are passed on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from patience import HANG_S

from services.tools.bench.support.relay import DelayRelay, delayed
from services.tools.local.brokers import Brokers
from shared.broker.client import Broker
from shared.broker.topology import Topology

ONE_WAY_S = 0.04
SLACK_S = 0.5
"""Longest extra delay of a byte on a busy machine."""

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(65536):
        writer.write(part)
    writer.close()


@asynccontextmanager
async def behind_relay(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with DelayRelay("127.0.0.1", port, ONE_WAY_S) as relay, asyncio.timeout(HANG_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            yield reader, writer
            writer.close()


async def test_each_direction_is_late_by_half_the_delay() -> None:
    arrived: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(100):
            arrived.append(time.monotonic())
            writer.write(part)

    ways: list[tuple[float, float]] = []
    async with behind_relay(answer) as (reader, writer):
        for _ in range(5):
            sent = time.monotonic()
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            back = time.monotonic()
            there = arrived.pop()
            ways.append((there - sent, back - there))
    for of_one in zip(*ways, strict=True):
        assert ONE_WAY_S <= min(of_one) + 0.001 < ONE_WAY_S + SLACK_S


async def test_many_bytes_are_in_transit_at_once_and_keep_their_order() -> None:
    async with behind_relay(echo) as (reader, writer):
        sent = b"".join(number.to_bytes(4) for number in range(500_000))
        started = time.monotonic()

        async def send() -> None:
            for start in range(0, len(sent), 10_000):
                writer.write(sent[start : start + 10_000])
                await asyncio.sleep(0)

        _, received = await asyncio.gather(send(), reader.readexactly(len(sent)))
        assert received == sent
        assert time.monotonic() - started < 150 * ONE_WAY_S, (
            "200 parts travel at the same time, not one after the other"
        )


async def test_an_end_arrives_after_the_last_byte_of_its_direction() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"all of " + await reader.read())
        writer.close()

    async with behind_relay(answer) as (reader, writer):
        writer.write(b"it")
        writer.write_eof()
        assert await reader.read() == b"all of it"


async def test_a_client_that_aborts_closes_the_servers_connection() -> None:
    gone = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(100) == b"ping"
        assert await reader.read(100) == b""
        writer.close()
        gone.set()

    async with behind_relay(answer) as (_, writer):
        writer.write(b"ping")
        await asyncio.sleep(3 * ONE_WAY_S)
        writer.transport.abort()
        await asyncio.wait_for(gone.wait(), HANG_S)


async def test_a_missing_or_closing_server_ends_the_connection() -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with behind_relay(leave) as (reader, _):
        assert await reader.read() == b""
    async with DelayRelay("127.0.0.1", 1, ONE_WAY_S) as relay:
        reader, _ = await asyncio.open_connection("127.0.0.1", relay.port)
        assert await asyncio.wait_for(reader.read(), HANG_S) == b""


async def test_no_delay_needs_no_relay() -> None:
    async with delayed({"a": "amqp://user:word@host:1/", "b": "redis://host/0"}, 0) as urls:
        assert urls == {"a": "amqp://user:word@host:1/", "b": "redis://host/0"}


async def test_rabbitmq_behind_relays_has_the_delay(brokers: Brokers, namespace: str) -> None:
    async with delayed({"url": brokers.amqp_url}, 2 * ONE_WAY_S) as urls:
        started = time.monotonic()
        broker = await Broker.connect(urls["url"], Topology(namespace), "far")
        assert time.monotonic() - started > 4 * 2 * ONE_WAY_S, "the handshake alone takes several round trips"
        await broker.close()
