"""A link to a server that a test can cut or hold up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

from services.tools.local.ports import free_ports


class Link:
    """A TCP connection to a server that can be cut and mended, as if the server were restarted, and held up, as if it
    stood still while `flowing` is not set."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        (self._port,) = free_ports(1)
        self._writers: set[asyncio.StreamWriter] = set()
        self._there: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.flowing = asyncio.Event()
        self.flowing.set()
        user, at, _ = self._parts.netloc.rpartition("@")
        self.url = urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self._port}"))

    @property
    def connections(self) -> int:
        """Return the number of clients that are connected."""
        return len(self._there)

    async def mend(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)

    async def cut(self, *, unnoticed: bool = False) -> None:
        """End every connection and refuse new ones. unnoticed: the server's ends stay open, as of a host that died."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers - (self._there if unnoticed else set()):
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        self._writers |= {writer, there_writer}
        self._there.add(there_writer)
        await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer))
        self._writers -= {writer, there_writer}
        self._there.discard(there_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(65536):
                await self.flowing.wait()
                writer.write(part)
                await writer.drain()
        except OSError:
            pass
        finally:
            if self._server is None or self._server.is_serving() or writer not in self._there:
                writer.close()


@asynccontextmanager
async def link_to(url: str) -> AsyncIterator[Link]:
    """A whole link to this server."""
    link = Link(url)
    await link.mend()
    yield link
    await link.cut()
