"""A TCP relay that delays every byte, in each direction.

It emulates the network between a drafter beside its user and the rest of the suite. Bytes keep their order, any number
of them may be in transit, and the throughput is not limited: only the travel time is emulated. The event loop of the
relay adds about a millisecond at most while nothing else runs in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

from services.tools.local.ports import LOOPBACK

CHUNK = 65536
PORTS = {"amqp": 5672, "redis": 6379}
"""Default port by URL scheme."""


class DelayRelay:
    """Forwards connections to a server, `one_way_s` late in each direction. Use as an async context manager.

    When one side closes, the other side is closed after the last bytes have arrived there.
    """

    def __init__(self, host: str, port: int, one_way_s: float, *, listen: str = LOOPBACK) -> None:
        """listen: address to listen on."""
        self.port = 0
        """The port that the relay listens on."""
        self._listen = listen
        self.one_way_s = one_way_s
        """Delay in each direction. It may change at any time; bytes keep their order."""
        self._there = host, port
        self._broken = False
        self._passing = asyncio.Event()
        self._passing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> DelayRelay:
        self._server = await asyncio.start_server(self._accept, self._listen, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Abort every connection, drop the bytes in transit, and refuse new connections until `mend`."""
        self._broken = True
        connections = tuple(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def hold(self) -> None:
        """Forward nothing until `mend` and close nothing, like a network that drops every packet."""
        self._passing.clear()

    def mend(self) -> None:
        """Accept new connections again, and forward the bytes held back."""
        self._broken = False
        self._passing.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._broken:
            writer.transport.abort()
            return
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, here_reader: asyncio.StreamReader, here: asyncio.StreamWriter) -> None:
        try:
            there_reader, there = await asyncio.open_connection(*self._there)
        except OSError:
            here.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as directions:
                for reader, writer in ((here_reader, there), (there_reader, here)):
                    travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
                    directions.create_task(self._depart(reader, travelling))
                    directions.create_task(self._arrive(travelling, writer))
        except* OSError:
            pass  # one side broke off; the other side is aborted below
        finally:
            for writer in (here, there):
                writer.transport.abort()

    async def _depart(self, reader: asyncio.StreamReader, travelling: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        part = b"-"
        while part:
            try:
                part = await reader.read(CHUNK)
            except ConnectionResetError:
                part = b""
            travelling.put_nowait((loop.time() + self.one_way_s, part))

    async def _arrive(self, travelling: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, part = await travelling.get()
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            await self._passing.wait()
            if not part:
                break
            writer.write(part)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def delayed(urls: dict[str, str], delay_s: float) -> AsyncIterator[dict[str, str]]:
    """Yield the same addresses behind relays that add `delay_s` to a round trip; unchanged if it is 0."""
    async with AsyncExitStack() as relays:
        changed = {}
        for key, url in urls.items():
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme)
            if delay_s <= 0 or parts.hostname is None or port is None:
                changed[key] = url
                continue
            relay = await relays.enter_async_context(DelayRelay(parts.hostname, port, delay_s / 2))
            user, at, _ = parts.netloc.rpartition("@")
            changed[key] = urlunsplit(parts._replace(netloc=f"{user}{at}{LOOPBACK}:{relay.port}"))
        yield changed
