"""The API process's end of the link to the engine's process.

It takes the place that RabbitMQ and Redis have for a gateway (`Publisher`, `SessionStore`): what the gateway's backend
publishes about sessions goes over the link, and there is no state beside the engine's own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.baseline import engine as core
from services.baseline.link import Frames, frame
from services.baseline.settings import BaselineSettings
from services.gateway.errors import unavailable
from services.gateway.sessions import Backend
from shared.broker import topology
from shared.broker.topology import Queue
from shared.errors import BrokersError, EngineError
from shared.messages import Cancel, Generate, Heartbeat, Message
from shared.state.store import Progress, Request, Session, SessionStatus

RECEIVED = 1 << 16
END_S = 10.0
"""How long the engine's process may take to end: the step that it is in, and the interpreter's own end."""


class EngineClient:
    """The engine's process, as the gateway's backend uses it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: Heartbeat) -> None:
        self._reader = reader
        self._writer = writer
        self._ready = ready
        self._gone = False

    async def deliver(self, backend: Backend) -> None:
        """Hand over results for ever. Raises EngineError when the engine's process has ended; its sessions have been
        told then."""
        frames = Frames()
        while data := await self._reader.read(RECEIVED):
            for message in frames.feed(data):
                await backend.receive(message)
        self._gone = True
        await backend.drain(0)
        raise EngineError("the engine's process has ended although nobody stopped it; its log lines say why")

    async def longest_session(self) -> int:
        """Most tokens of a session."""
        if self._gone:
            raise unavailable("the engine has ended; try again when it has been started anew", "no_engine")
        return self._ready.max_len

    async def missing(self) -> dict[str, str | None]:
        """What is needed to serve."""
        return {"engine": "has ended" if self._gone else None}

    async def prove(self) -> None:
        """Raises EngineError when the engine has ended."""
        if self._gone:
            raise EngineError("has ended")

    async def publish(self, message: Message, key: str, *, cc: tuple[str, ...] = (), persistent: bool = False) -> None:
        """Send what the engine has to know. Raises BrokersError when it has ended."""
        if not isinstance(message, Generate | Cancel):
            return
        if self._gone or self._writer.is_closing():
            raise BrokersError("the engine has ended")
        self._writer.write(frame(message))

    async def create(
        self,
        request: Request,
        prompt: Sequence[int],
        elapsed_ms: float = 0.0,
        *,
        patience_ms: int = 0,
        kept: bytes = b"",
    ) -> None:
        """Nothing: all of a session is in its Generate."""

    async def progress(self, session: str, from_len: int) -> Progress | None:
        """Nothing new: the link loses no results."""
        return Progress(SessionStatus.ACTIVE, from_len, [], None)

    async def cancel(self, session: str, gateway: str = "") -> bool:
        """Nothing: the Cancel says it."""
        return True

    async def leave(self, session: str, gateway: str, length: int) -> None:
        """End the session: no other gateway could collect it."""
        await self.publish(Cancel(session=session, reason="abort"), topology.CANCEL)

    async def kept(self, session: str) -> bytes | None:
        """Nothing: a stream that broke cannot be gone on with."""
        return None

    async def collect(self, session: str, gateway: str) -> bool:
        """There is none to be had."""
        return False

    async def read(self, sessions: Sequence[str]) -> list[Session | None]:
        """There is none to be had."""
        return [None for _ in sessions]

    async def bind(self, queue: Queue, key: str) -> None:
        """Nothing: there are no other gateways to hear."""

    async def unbind(self, queue: Queue, key: str) -> None:
        """Nothing, as with `bind`."""


@asynccontextmanager
async def started(settings: BaselineSettings, instance: str) -> AsyncIterator[EngineClient]:
    """The engine in a process of its own, ready to serve. Raises EngineError when it does not come up."""
    ours, theirs = socket.socketpair()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=core.run, args=(settings, instance, theirs), name="engine", daemon=True)
    process.start()
    theirs.close()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        frames = Frames()
        ready: list[Message] = []
        while not ready:
            if not (data := await reader.read(RECEIVED)):
                raise EngineError("the engine's process did not come up; its log lines say why")
            ready = frames.feed(data)
        assert isinstance(ready[0], Heartbeat)
        yield EngineClient(reader, writer, ready[0])
    finally:
        writer.close()
        await asyncio.to_thread(process.join, END_S)
        if process.is_alive():
            process.kill()
