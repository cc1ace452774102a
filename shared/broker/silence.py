"""Connections that end when the server falls silent, so that another of its addresses is tried soon.

A server that hangs answers nothing and closes nothing: only its missing heartbeats show it, and the client library
gives up after three of them.
"""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter, Transport
from typing import Any

from aiormq.connection import TransportFactory, parse_heartbeat
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

from shared.runtime import logging

GRACE_S = 2.0
"""Silence beyond a heartbeat, within which RabbitMQ sends at least one frame."""
TICK_S = 0.5


class _Reader(StreamReader):
    """A stream that shows whether its reader waits for data, and how often data came."""

    arrivals = 0
    waiting = False

    def feed_data(self, data: Any) -> None:
        self.arrivals += 1
        super().feed_data(data)

    async def readexactly(self, n: int) -> bytes:
        self.waiting = True
        try:
            return await super().readexactly(n)
        finally:
            self.waiting = False


class ImpatientTransports(TransportFactory):
    """Opens connections that end when the client waits and no byte comes for a heartbeat and `GRACE_S`.

    Time is counted in ticks of this process's event loop: while the process itself stands still, none passes. Without
    heartbeats (`heartbeat=0` in the URL) silence is normal.
    """

    def __init__(self) -> None:
        self._watches: set[asyncio.Task[None]] = set()

    async def create(self, url: URL, **kwargs: Any) -> tuple[StreamReader, StreamWriter]:
        """Connect. Raises AMQPConnectionError."""
        provider = kwargs.pop("ssl_context_provider")
        context = await provider.get_context() if url.scheme == "amqps" else None
        assert url.host is not None
        assert url.port is not None  # the client library has put it in
        loop = asyncio.get_running_loop()
        reader = _Reader(loop=loop)
        protocol = StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.create_connection(lambda: protocol, url.host, url.port, ssl=context, **kwargs)
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        if heartbeat_s := parse_heartbeat(url.query.get("heartbeat", "0")):
            watch = asyncio.create_task(_watch(reader, transport, heartbeat_s + GRACE_S, f"{url.host}:{url.port}"))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        return reader, StreamWriter(transport, protocol, reader, loop)


async def _watch(reader: _Reader, transport: Transport, longest_s: float, address: str) -> None:
    silent_s = 0.0
    while not transport.is_closing():
        arrivals = reader.arrivals
        await asyncio.sleep(TICK_S)
        silent_s = silent_s + TICK_S if reader.waiting and reader.arrivals == arrivals else 0.0
        if silent_s >= longest_s:
            logging.get().warning("RabbitMQ is silent, connection given up", address=address, silent_s=silent_s)
            transport.abort()
