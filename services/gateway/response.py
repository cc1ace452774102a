"""Sending an answer: runs a request's sessions and writes their text, whole or as a stream, while the client waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway import stream
from services.gateway.answer import Run
from services.gateway.core.completion import Piece, Token
from services.gateway.core.cursor import NOTHING, Place, Shown, rest_of
from services.gateway.core.keys import ApiKey
from services.gateway.errors import ApiError, internal_error
from services.gateway.ledger import Ledger
from services.gateway.request import Plan
from services.gateway.sessions import Backend
from services.gateway.stream import Fields, Reply, Text, Usage
from shared.messages import Finish
from shared.runtime import logging
from shared.runtime.tasks import cancel
from shared.state.store import Session as Stored

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

CANCEL_AGAIN_S = 0.1


@dataclass(frozen=True)
class Order:
    """How the client wants its answer, and what it is about."""

    plans: list[Plan]
    prompt_tokens: int
    stream: bool
    trace: bool
    started_s: float
    headers: dict[str, str]
    key: ApiKey | None = None
    """Who is charged for it."""
    reserved: int = 0
    """Tokens that are charged in advance."""
    place: Place | None = None
    """How far the client has this answer, where it goes on with it."""
    states: Sequence[Stored] = ()
    """The sessions as Redis holds them, where the client goes on with their texts."""

    @property
    def charged(self) -> int:
        """Tokens of it that were charged before. A gateway that died has charged what was asked for, and one that left
        the sessions to others what it knew of."""
        if not self.states:
            return 0
        lengths = [len(state.tokens) if state.left_at is None else state.left_at for state in self.states]
        made = sum(lengths) - sum(state.request.prompt_len for state in self.states)
        return self.prompt_tokens + made


class Answer(Response):
    """The response to a generation request.

    The status is sent with the first text or error, so that early errors have a proper one. A client that goes away
    cancels its sessions at once; one that reads slowly is waited for without holding up anybody else.
    """

    def __init__(self, backend: Backend, ledger: Ledger, reply: Reply, order: Order) -> None:
        super().__init__()
        self._backend = backend
        self._ledger = ledger
        self._reply = reply
        self._order = order

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises ApiError while nothing has been sent."""
        work = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                logging.get().info("client went away", session=self._reply.id)
        finally:
            for task in (work, gone):
                await _stop(task)

    async def _send(self, send: Send) -> None:
        order = self._order
        sessions = [plan.session for plan in order.plans]
        resumed = order.place is not None
        async with self._ledger.charge(order.key, sessions, order.reserved, resumed=resumed) as charge:
            order.headers.update(charge.headers)
            if order.place is None:
                running = self._backend.run(order.plans, order.started_s)
            else:
                running = self._backend.resume(order.plans, order.states, order.started_s)
            async with running as run:
                try:
                    if order.stream:
                        await self._stream(run, send)
                    else:
                        await self._whole(run, send)
                finally:
                    charge.used = self._usage(run).total - order.charged

    async def _whole(self, run: Run, send: Send) -> None:
        texts = [""] * len(run.lives)
        finishes = [""] * len(run.lives)
        tokens: list[list[Token]] = [[] for _ in run.lives]
        async for batch in run.batches():
            for index, item in batch:
                if isinstance(item, Piece):
                    texts[index] += item.text
                    tokens[index] += item.tokens
                else:
                    finishes[index] = item.value
        fields = self._reply.whole([Text(*pair) for pair in zip(texts, finishes, strict=True)], self._usage(run))
        if self._order.trace:
            made = [token for of_one in tokens for token in of_one]
            fields["wisp"] = {"tokens": stream.tokens(made), "summary": self._summary(run)}
        body = stream.encode(fields)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self._order.headers}
        await _start(send, headers)
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, run: Run, send: Send) -> None:
        begun = False
        place = self._order.place or Place(self._reply.id)
        known = dict(place.shown)
        seen: dict[int, Shown] = {}
        try:
            async for batch in run.batches():
                events = b""
                for index, item in batch:
                    if index not in place.shown:
                        place.shown[index] = NOTHING
                        if opening := self._reply.opening(index):
                            events += stream.event(opening, place)
                    if isinstance(item, Piece):
                        before = seen.get(index, NOTHING)
                        seen[index] = before.after(item)
                        if (rest := rest_of(item, before, known.get(index, NOTHING))) is not None:
                            place.shown[index] = place.shown[index].most(seen[index])
                            events += stream.event(self._more(index, rest), place)
                    else:
                        events += self._end(run, index, item, place)
                if not begun:
                    begun = True
                    await _start(send, STREAM_HEADERS | self._order.headers)
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, ApiError):
                logging.get().exception("stream crashed", session=self._reply.id)
                error = internal_error()
            await send({"type": "http.response.body", "body": stream.event(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": stream.DONE})

    def _more(self, index: int, piece: Piece) -> Fields:
        """The chunk for one piece."""
        delta = self._reply.delta(index, piece.text)
        if self._order.trace:
            delta["wisp"] = stream.trace(piece)
        return delta

    def _end(self, run: Run, index: int, finish: Finish, place: Place) -> bytes:
        """The events for the end of one text, as far as the client lacks them."""
        chunks = []
        if index not in place.closed:
            chunks.append(self._reply.closing(index, finish.value))
            if self._order.trace and (rounds := run.lives[index].session.take_rounds()):
                chunks[0]["wisp"] = {"rounds": stream.rounds(rounds)}
            place.closed.add(index)
        is_last = len(place.closed) == len(run.lives)
        last_id = str(place)
        if is_last and self._reply.include_usage and not place.usage:
            chunks.append(self._reply.usage(self._usage(run)))
            place.usage = True
        if is_last and self._order.trace and chunks:
            chunks[-1].setdefault("wisp", {})["summary"] = self._summary(run)
        return b"".join(stream.event(fields, last_id if fields["choices"] else place) for fields in chunks)

    def _usage(self, run: Run) -> Usage:
        return Usage(self._order.prompt_tokens, sum(live.session.tally.tokens for live in run.lives))

    def _summary(self, run: Run) -> Fields:
        plan = self._order.plans[0]
        return stream.summary(
            [live.session.tally for live in run.lives],
            [live.outcome for live in run.lives if live.outcome is not None],
            run.ttft_ms,
            run.total_ms,
            service_class=plan.service_class,
            slo=plan.slo,
        )


async def _stop(task: asyncio.Future[None]) -> None:
    """Cancel a task and wait for its end."""
    await cancel([task], CANCEL_AGAIN_S)
    with suppress(asyncio.CancelledError, ApiError):
        await task


async def _start(send: Send, headers: dict[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
