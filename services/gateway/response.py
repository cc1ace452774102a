"""The HTTP response to a generation request: runs its sessions and sends their text, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway import spans, stream
from services.gateway.answer import Answer, AnswerForm
from services.gateway.core.completion import Piece, Token
from services.gateway.core.cursor import NOTHING, Delivered, rest_of
from services.gateway.core.reasoning import ReasoningSplitter, SplitText
from services.gateway.core.tool_calls import ContentDelta, ToolDelta
from services.gateway.errors import ApiError, internal_error
from services.gateway.ledger import Charge, Ledger
from services.gateway.logprobs import LogprobFields
from services.gateway.sessions import Sessions
from services.gateway.stream import CalledTool, Choice, Chunks, Fields, encode
from shared.messages import Finish
from shared.runtime import logging, tracing
from shared.runtime.service import cancel

SEED_HEADER = "x-wisp-seed"
SLO_HEADER = "x-wisp-slo"
"""Says that the SLO which the request asks for cannot be kept, and what can be."""
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

CANCEL_AGAIN_S = 0.1


class AnswerResponse(Response):
    """The response to a generation request.

    The status is sent with the first text or error, so that early errors have their own status. A client that goes
    away cancels its sessions at once. A slow reader delays nobody else.
    """

    def __init__(self, sessions: Sessions, ledger: Ledger, answer: Answer) -> None:
        super().__init__()
        self._sessions = sessions
        self._ledger = ledger
        self._answer = answer
        form = answer.form
        self._logprobs: LogprobFields | None = None
        """None if the request asks for no log-probabilities."""
        if form.logprobs is not None or form.prompt_logprobs is not None:
            self._logprobs = LogprobFields(form, sessions.tokenizer)
        self._extra_headers = {SEED_HEADER: str(answer.form.seed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises ApiError while nothing has been sent."""
        work = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                logging.get().info("client went away", session=self._answer.answer_id)
        finally:
            for task in (work, gone):
                await _stop(task)

    async def _send(self, send: Send) -> None:
        answer = self._answer
        if answer.key is None:
            await self._serve(send)
            return
        async with self._ledger.charge(
            answer.key, answer.session_ids, answer.reserved_tokens, resumed=answer.resumed
        ) as charge:
            self._extra_headers |= charge.headers
            await self._serve(send, charge)

    async def _serve(self, send: Send, charge: Charge | None = None) -> None:
        answer = self._answer
        serving = self._sessions.resume(answer) if answer.resumed else self._sessions.run(answer)
        async with spans.traced(answer, serving) if tracing.current() else serving:
            if answer.unreachable is not None:
                self._extra_headers[SLO_HEADER] = str(answer.unreachable)
            chunks = Chunks.of(answer)
            try:
                if answer.stream:
                    await self._stream(chunks, send)
                else:
                    await self._whole(chunks, send)
            finally:
                if charge is not None:
                    charge.used = answer.usage.total - answer.charged_tokens

    async def _whole(self, chunks: Chunks, send: Send) -> None:
        answer = self._answer
        texts = [""] * len(answer.running)
        finishes = [""] * len(answer.running)
        tokens: list[list[Token]] = [[] for _ in answer.running]
        async for batch in answer.batches():
            for index, item in batch:
                if isinstance(item, Piece):
                    texts[index] += item.text
                    tokens[index] += item.tokens
                else:
                    finishes[index] = item.value
        choices = []
        for session, text, finish, made in zip(answer.running, texts, finishes, tokens, strict=True):
            choice = choice_of(answer.form, text, finish)
            if self._logprobs is not None:
                completion, prompt = session.completion, session.generate.prompt
                shown = [*self._logprobs.prompt(completion, prompt), *made]
                logprobs, of_prompt = self._logprobs.of(shown, 0), self._logprobs.of_prompt(completion, prompt)
                choice = replace(choice, logprobs=logprobs, prompt_logprobs=of_prompt)
            choices.append(choice)
        fields = self._object(chunks, choices, [token for of_one in tokens for token in of_one])
        await self._before_end(fields, None)
        body = encode(fields)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self._extra_headers}
        await _start(send, headers)
        await send({"type": "http.response.body", "body": body})

    def _object(self, chunks: Chunks, choices: Sequence[Choice], tokens: Sequence[Token]) -> Fields:
        """Return the body of an answer that is not streamed."""
        fields = chunks.whole(choices, self._answer.usage) | _metrics(self._answer)
        about = _about(self._answer)
        if self._answer.form.trace:
            about["tokens"] = stream.tokens(tokens)
        if about:
            fields["wisp"] = about
        return fields

    async def _before_end(self, fields: Fields | None, events: EventMaker | None) -> None:
        """Hook for subclasses, which is called before a whole answer (with its body) or a batch of events is sent."""

    def _events(self, chunks: Chunks) -> EventMaker:
        """Return the maker of the events of a streamed answer."""
        return Events(self._answer, chunks, self._logprobs)

    async def _stream(self, chunks: Chunks, send: Send) -> None:
        begun = False
        events = self._events(chunks)
        try:
            async for batch in self._answer.batches():
                body = b"".join(events.of(index, item) for index, item in batch)
                await self._before_end(None, events)
                if not begun:
                    begun = True
                    await _start(send, STREAM_HEADERS | self._extra_headers)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, ApiError):
                logging.get().exception("stream crashed", session=self._answer.answer_id)
                error = internal_error()
            await send({"type": "http.response.body", "body": events.failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": events.end})


class EventMaker(Protocol):
    """Makes the events of a streamed answer."""

    end: bytes
    """Sent last, also after an error."""

    def of(self, index: int, item: Piece | Finish) -> bytes:
        """Return the events for a completion's next piece or its end."""

    def failed(self, error: ApiError) -> bytes:
        """Return the event of an error, which is the last one."""


class CompletionText:
    """Splits the text of one completion into reasoning, content and tool calls."""

    def __init__(self, form: AnswerForm) -> None:
        self._splitter = None if form.thinks is None else ReasoningSplitter(is_open=form.thinks)
        """None if no reasoning is marked: all of the text is content."""
        self._parser = None if form.tools is None else form.tools.parser()

    def feed(self, text: str) -> tuple[str, list[ToolDelta]]:
        """Add a piece of text; return the reasoning in it, and the content and calls that it completes."""
        split = SplitText("", text) if self._splitter is None else self._splitter.feed(text)
        if self._parser is not None:
            return split.reasoning, self._parser.feed(split.content)
        return split.reasoning, [ContentDelta(split.content)] if split.content else []

    def finish(self) -> list[ToolDelta]:
        """End the text; return the last content and calls."""
        return [] if self._parser is None else self._parser.finish()

    def finish_reason(self, finish: str) -> str:
        """Return the finish reason of the completion, which is `tool_calls` if it ended with some."""
        called = self._parser is not None and self._parser.calls
        return "tool_calls" if called and finish == Finish.STOP else finish


def choice_of(form: AnswerForm, text: str, finish: str) -> Choice:
    """Return a complete completion, with the reasoning and the tool calls that are in its text."""
    parts = CompletionText(form)
    reasoning, deltas = parts.feed(text)
    content = ""
    calls: list[CalledTool] = []
    for delta in [*deltas, *parts.finish()]:
        if isinstance(delta, ContentDelta):
            content += delta.text
            continue
        if delta.name is not None:
            calls.append(CalledTool(delta.name))
        calls[delta.index].arguments += delta.arguments
    return Choice(SplitText(reasoning, content), parts.finish_reason(finish), calls)


class Events:
    """Makes a stream's events, without those that the client already has, and advances the answer's cursor."""

    end = stream.DONE

    def __init__(self, answer: Answer, chunks: Chunks, logprobs: LogprobFields | None) -> None:
        self._answer = answer
        self._logprobs = logprobs
        self._chunks = chunks
        self._cursor = answer.cursor
        self._known = dict(answer.cursor.delivered)
        self._seen: dict[int, Delivered] = {}
        self._texts = [CompletionText(answer.form) for _ in answer.form.echoes]

    def of(self, index: int, item: Piece | Finish) -> bytes:
        """Return the events for a completion's next piece or its end."""
        events = b""
        if index not in self._cursor.delivered:
            self._cursor.delivered[index] = NOTHING
            if opening := self._chunks.opening(index):
                events = self._event(opening)
        return events + (self._piece(index, item) if isinstance(item, Piece) else self._end(index, item))

    def failed(self, error: ApiError) -> bytes:
        """See `EventMaker`."""
        return stream.event(error.body())

    def _piece(self, index: int, piece: Piece) -> bytes:
        before, known = self._seen.get(index, NOTHING), self._known.get(index, NOTHING)
        self._seen[index] = before.after(piece)
        text = self._texts[index]
        rest = rest_of(piece, before, known)
        if rest is not piece:
            # The parser has to read the part that the client has, so that it splits the rest as before the break.
            text.feed(piece.text.removesuffix(rest.text) if rest is not None else piece.text)
        if rest is None:
            return b""
        self._cursor.delivered[index] = self._cursor.delivered[index].most(self._seen[index])
        reasoning, deltas = text.feed(rest.text)
        logprobs = self._logprobs_of(index, rest, before)
        if self._answer.form.tools is None:
            content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
            chunk = self._chunks.delta(index, SplitText(reasoning, content), logprobs)
        else:
            if not (deltas or reasoning or logprobs or self._answer.form.trace):
                return b""
            chunk = self._chunks.tool_deltas(index, deltas, reasoning, logprobs)
        if self._answer.form.trace:
            chunk["wisp"] = stream.trace(rest)
        return self._event(chunk)

    def _logprobs_of(self, index: int, rest: Piece, before: Delivered) -> Fields | None:
        """Return the log-probabilities of a piece, the first one's with those of an echoed prompt."""
        if self._logprobs is None:
            return None
        session, known = self._answer.running[index], self._known.get(index, NOTHING)
        tokens, start = rest.tokens, max(before.characters, known.characters)
        if start == 0:
            tokens = [*self._logprobs.prompt(session.completion, session.generate.prompt), *tokens]
        return self._logprobs.of(tokens, start)

    def _end(self, index: int, finish: Finish) -> bytes:
        answer, cursor = self._answer, self._cursor
        chunks = []
        if index not in cursor.closed:
            text = self._texts[index]
            rest = text.finish()
            chunks.append(self._chunks.closing(index, text.finish_reason(finish.value), rest))
            if answer.form.trace and (rounds := answer.running[index].completion.take_rounds()):
                chunks[0]["wisp"] = {"rounds": stream.rounds(rounds)}
            cursor.closed.add(index)
        is_last = len(cursor.closed) == len(answer.running)
        closing_id = str(cursor)
        if is_last and chunks and not answer.form.include_usage:
            chunks[-1] |= _metrics(answer)
        if is_last and answer.form.include_usage and not cursor.usage:
            chunks.append(self._chunks.usage(answer.usage) | _metrics(answer))
            cursor.usage = True
        if is_last and chunks and (about := _about(answer)):
            chunks[-1].setdefault("wisp", {}).update(about)
        return b"".join(self._event(fields, closing_id if fields["choices"] else None) for fields in chunks)

    def _event(self, fields: Fields, event_id: str | None = None) -> bytes:
        """Encode an event, by default with the cursor as its id, if the client takes ids."""
        return stream.event(fields, (event_id or self._cursor) if self._answer.event_ids else None)


def _metrics(answer: Answer) -> Fields:
    """Return vLLM's metrics if the request asks for them; like vLLM's they are null for several completions."""
    if not answer.form.metrics:
        return {}
    only = len(answer.running) == 1
    return {
        "metrics": {"speculative_decoding": stream.speculation(answer.running[0].completion.tally)} if only else None
    }


def _about(answer: Answer) -> Fields:
    """Return the `wisp` fields about a complete answer: those of a trace, and its arithmetics if they are mixed."""
    fields: Fields = {}
    if answer.form.trace:
        fields["summary"] = stream.summary(
            [session.completion.tally for session in answer.running],
            [session.outcome for session in answer.running if session.outcome is not None],
            answer.ttft_ms,
            answer.total_ms,
            service_class=answer.form.service_class,
            slo=answer.sessions[0].slo,
        )
    if answer.form.trace or len(answer.committed_in) > 1:
        fields["arithmetic"] = answer.committed_in
    return fields


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
