"""The API process's end of the link to the engine's process.

`EngineClient` is both the transport and the upstream of the gateway. It sends sessions over the link. The engine holds
all their state.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from services.baseline import engine as core
from services.baseline.link import Frames, frame
from services.baseline.settings import BaselineSettings
from services.gateway.errors import unavailable
from services.gateway.gateway import Gateway
from shared.errors import BrokersError, EngineError
from shared.messages import Cancel, Ended, Generate, Heartbeat, Message
from shared.state.sessions import Session, SessionProgress, SessionStatus, SessionTurn

RECEIVED = 1 << 16
"""Most bytes of one read from the link."""
MOST_RESPONSES = 1000
"""Most stored responses. The oldest one is removed first."""
END_S = 10.0
"""Time for the engine's process to end: its current step and the interpreter's shutdown."""


class EngineClient:
    """The engine's process as the gateway's `Transport` and `Upstream`."""

    stall_reason = "the engine does not work on this session"

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: Heartbeat) -> None:
        self._reader = reader
        self._writer = writer
        self._ready = ready
        self._gone = False
        self._responses: dict[str, bytes] = {}

    async def deliver(self, gateway: Gateway) -> None:
        """Deliver results until the engine's process ends.

        Then fail the running sessions and raise EngineError.
        """
        frames = Frames()
        while data := await self._reader.read(RECEIVED):
            for message in frames.feed(data):
                await gateway.sessions.receive(message)
        self._gone = True
        await gateway.sessions.drain(0)
        raise EngineError("the engine's process has ended although nobody stopped it; its log has the reason")

    async def longest_session(self, needs: Collection[str] = ()) -> int:
        """Return the most tokens of a session. Raises ApiError when the engine has ended."""
        if self._gone:
            raise unavailable("the engine has ended; try again when it has been restarted", "no_engine")
        return self._ready.max_len

    async def missing(self) -> dict[str, str | None]:
        """Return the engine's problem; None if it runs."""
        return {"engine": "has ended" if self._gone else None}

    async def prove(self) -> None:
        """Raise EngineError when the engine has ended."""
        if self._gone:
            raise EngineError("has ended")

    async def start(self, generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        """Send a session to the engine. There is one pool, and streams cannot be resumed."""
        self._send(generate)

    async def cancel(self, session_id: str, reason: str) -> None:
        """End a session in the engine."""
        if not self._closed:
            self._send(Cancel(session=session_id, reason=reason))

    async def leave(self, session_id: str, length: int) -> None:
        """End a session in the engine: no other gateway can collect it."""
        await self.cancel(session_id, "abort")

    async def resume_record(self, answer_id: str) -> bytes | None:
        """Return None: streams cannot be resumed."""
        return None

    async def store_response(self, response_id: str, body: bytes) -> None:
        """Store a response in memory; only the latest `MOST_RESPONSES` stay."""
        self._responses[response_id] = body
        while len(self._responses) > MOST_RESPONSES:
            del self._responses[next(iter(self._responses))]

    async def stored_response(self, response_id: str) -> bytes | None:
        """Return a stored response; None if there is none."""
        return self._responses.get(response_id)

    @asynccontextmanager
    async def collect(self, session_ids: Sequence[str]) -> AsyncIterator[list[Session | None]]:
        """Yield None for each session: there are no other gateways."""
        yield [None for _ in session_ids]

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        """Report no progress: the link loses no results."""
        return SessionProgress(SessionStatus.ACTIVE, from_len, [], None)

    async def turns(self) -> list[SessionTurn]:
        """Return no turns: there are no other gateways."""
        return []

    async def report(self, ended: Ended) -> None:
        """Do nothing: the engine knows the end of its sessions."""

    @property
    def _closed(self) -> bool:
        return self._gone or self._writer.is_closing()

    def _send(self, message: Message) -> None:
        if self._closed:
            raise BrokersError("the engine has ended")
        self._writer.write(frame(message))


@asynccontextmanager
async def started(settings: BaselineSettings, instance: str) -> AsyncIterator[EngineClient]:
    """Run the engine in a process of its own during the context. Raises EngineError when it does not start."""
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
                raise EngineError("the engine's process did not start; its log has the reason")
            ready = frames.feed(data)
        assert isinstance(ready[0], Heartbeat)
        yield EngineClient(reader, writer, ready[0])
    finally:
        writer.close()
        await asyncio.to_thread(process.join, END_S)
        if process.is_alive():
            process.kill()
