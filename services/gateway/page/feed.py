"""The feed of the fleet view: the messages of the whole suite, gathered while somebody looks, as server-sent events.

The first viewer opens a connection to RabbitMQ with a queue for all of them, and the last one closes it: without
viewers the brokers have no work with it. The queue is bounded and drops the oldest messages, so a gateway that cannot
follow shows less, and its streams go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.core.fleet_record import Fields, FleetRecord
from services.gateway.errors import ApiError
from services.gateway.stream import encode
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.incoming import Handler
from shared.broker.topology import Topology
from shared.errors import BrokersError
from shared.messages import Message
from shared.runtime import logging
from shared.runtime.tls import Tls

TICK_S = 0.25
"""Time between two events of a viewer."""
STATE_TICKS = 2
"""Ticks between two events with the whole state."""
VIEWERS = 16
QUEUE_LENGTH = 10_000
"""Length of the queue at RabbitMQ."""
RETRY_S = 2.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class MessageSource(Protocol):
    """Delivers the suite's messages."""

    async def listen(self, receive: Handler, listening: Callable[[], None]) -> None:
        """Deliver messages until cancelled; call `listening` once they come. Raises BrokersError."""


@dataclass(frozen=True)
class BrokerMessages:
    """The suite's messages from RabbitMQ, over a connection of its own."""

    amqp_url: str
    topology: Topology
    instance: str
    tls: Tls

    async def listen(self, receive: Handler, listening: Callable[[], None]) -> None:
        """See `MessageSource`."""
        name = f"{self.instance}.fleet"
        broker = await Broker.connect(self.amqp_url, self.topology, name, tls=self.tls)
        try:
            queue = self.topology.own_queue("gateway", name, topology.FLEET)
            await broker.consume(replace(queue, arguments={"x-max-length": QUEUE_LENGTH}), receive)
            listening()
            await asyncio.Event().wait()
        finally:
            with suppress(Exception):
                await broker.close()


class FleetFeed:
    """The viewers of one gateway, and the record that they share."""

    def __init__(self, source: MessageSource) -> None:
        self._source = source
        self._viewers = 0
        self._work: asyncio.Task[None] | None = None
        self._record = FleetRecord(0.0)
        self._problem: str | None = None
        """Why no messages are received; None if they are, and while the first connection is made."""
        self._connected = False
        self.closed = False
        """Set when the gateway shuts down: the viewers' streams end."""

    @property
    def viewers(self) -> int:
        """Number of open streams."""
        return self._viewers

    @property
    def listening(self) -> bool:
        """True while messages are received."""
        return self._work is not None

    @asynccontextmanager
    async def viewer(self) -> AsyncIterator[AsyncIterator[Fields]]:
        """Give one viewer's events. Raises ApiError when there are too many viewers."""
        if self._viewers >= VIEWERS:
            raise ApiError(429, f"{VIEWERS} fleet views are open at this gateway; close one", code="too_many_viewers")
        self._viewers += 1
        if self._work is None:
            self._record = FleetRecord(_now_ms())
            self._problem, self._connected = None, False
            self._work = asyncio.create_task(self._listen())
        try:
            async with aclosing(self._events()) as events:
                yield events
        finally:
            self._viewers -= 1
            if not self._viewers and self._work is not None:
                work, self._work = self._work, None
                self._record = FleetRecord(0.0)
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work

    async def _listen(self) -> None:
        while True:
            try:
                await self._source.listen(self._receive, self._works)
            except BrokersError as error:
                self._problem = str(error)
                logging.get().warning("the fleet view receives no messages", error=str(error))
            except Exception as error:
                self._problem = f"{type(error).__name__}; the gateway's log has more"
                logging.get().exception("the fleet view failed")
            await asyncio.sleep(RETRY_S)

    def _works(self) -> None:
        self._problem, self._connected = None, True

    async def _receive(self, message: Message) -> None:
        self._record.add(message, _now_ms())

    async def _events(self) -> AsyncGenerator[Fields]:
        record, seen, tick = self._record, 0, 0
        while not self.closed:
            now_ms = _now_ms()
            record.settle(now_ms)
            fields: Fields = {"now_ms": round(now_ms - record.started_ms, 2)}
            if news := record.news(seen):
                fields["news"] = news
            seen = record.number
            if tick % STATE_TICKS == 0:
                fields["state"] = record.state(now_ms)
                fields["problem"] = self._problem
                fields["connected"] = self._connected
            yield fields
            tick += 1
            await asyncio.sleep(TICK_S)


class FeedResponse(Response):
    """Response that streams a viewer's events until the client goes away."""

    def __init__(self, feed: FleetFeed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Raises ApiError before the first one when there are too many viewers."""
        async with self._feed.viewer() as events:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            work = asyncio.create_task(_send_all(events, send))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
                    await send({"type": "http.response.body", "body": b""})
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)


async def _send_all(events: AsyncIterator[Fields], send: Send) -> None:
    async for fields in events:
        body = b"data: " + encode(fields) + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _now_ms() -> float:
    return monotonic() * 1000
