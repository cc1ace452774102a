"""Sending an answer: runs a request's sessions and writes their text, whole or as a stream, while the client waits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway import stream
from services.gateway.backend import Backend
from services.gateway.errors import ApiError, internal_error
from services.gateway.keys import ApiKey
from services.gateway.ledger import Ledger
from services.gateway.plan import Plan
from services.gateway.run import Run
from services.gateway.session import Piece, Token
from services.gateway.stream import Fields, Reply, Text, Usage
from shared import logging
from shared.tasks import cancel

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
        async with self._ledger.charge(order.key, [plan.session for plan in order.plans], order.reserved) as charge:
            order.headers.update(charge.headers)
            async with self._backend.run(order.plans, order.started_s) as run:
                try:
                    if order.stream:
                        await self._stream(run, send)
                    else:
                        await self._whole(run, send)
                finally:
                    charge.used = self._usage(run).total

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
        opened: set[int] = set()
        closed = 0
        try:
            async for batch in run.batches():
                events = b""
                for index, item in batch:
                    if index not in opened and (opening := self._reply.opening(index)):
                        events += stream.event(opening)
                    opened.add(index)
                    closed += not isinstance(item, Piece)
                    for fields in self._chunks(run, index, item, is_last=closed == len(run.lives)):
                        events += stream.event(fields)
                if not begun:
                    begun = True
                    await _start(send, STREAM_HEADERS | self._order.headers)
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, ApiError):
                logging.get().exception("stream crashed", session=self._reply.id)
                error = internal_error()
            await send({"type": "http.response.body", "body": stream.event(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": stream.DONE})

    def _chunks(self, run: Run, index: int, item: Piece | Any, is_last: bool) -> list[Fields]:
        """The chunks for one piece, or for the end of one text."""
        if isinstance(item, Piece):
            delta = self._reply.delta(index, item.text)
            if self._order.trace:
                delta["wisp"] = stream.trace(item)
            return [delta]
        chunks = [self._reply.closing(index, item.value)]
        if self._order.trace and (rounds := run.lives[index].session.take_rounds()):
            chunks[0]["wisp"] = {"rounds": stream.rounds(rounds)}
        if is_last and self._reply.include_usage:
            chunks.append(self._reply.usage(self._usage(run)))
        if is_last and self._order.trace:
            chunks[-1].setdefault("wisp", {})["summary"] = self._summary(run)
        return chunks

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
