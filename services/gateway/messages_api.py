"""Anthropic's Messages API: `/v1/messages`, whole or streamed, and its count of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from sys import float_info
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import from_json

from services.gateway.answer import Answer
from services.gateway.body import parse, read_body
from services.gateway.core.completion import Piece, Token
from services.gateway.core.tool_calls import CallDelta, ContentDelta, ToolDelta
from services.gateway.errors import MESSAGES_PATH, ApiError
from services.gateway.gateway import Gateway
from services.gateway.messages_body import CountRequest, MessagesRequest
from services.gateway.prompt import Limits, chat_tokens
from services.gateway.request import accept, check_model
from services.gateway.response import AnswerResponse, CompletionText, EventMaker
from services.gateway.stream import Choice, Chunks, Fields, encode
from shared.messages import Finish


def add_messages(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes of Anthropic's API."""
    tokenizer = gateway.model.tokenizer

    @app.post(MESSAGES_PATH)
    async def messages(request: Request) -> Response:
        started_s = monotonic()
        asked = parse(MessagesRequest, await read_body(gateway.settings, request))
        check_model(gateway, asked.model)
        answer = await accept(gateway, request, asked.chat(tokenizer), started_s)
        return MessageResponse(gateway.sessions, gateway.ledger, answer)

    @app.post(f"{MESSAGES_PATH}/count_tokens")
    async def count_tokens(request: Request) -> JSONResponse:
        asked = parse(CountRequest, await read_body(gateway.settings, request))
        check_model(gateway, asked.model)
        folder = gateway.model.folder
        tokens = await chat_tokens(tokenizer, Limits(folder.max_len, folder.vocab_size), asked.chat(tokenizer))
        return JSONResponse({"input_tokens": len(tokens)})


class MessageResponse(AnswerResponse):
    """The response to a request for a message."""

    def _object(self, chunks: Chunks, choices: Sequence[Choice], tokens: Sequence[Token]) -> Fields:
        (choice,) = choices
        blocks: list[Fields] = []
        if choice.text.reasoning:
            blocks.append({"type": "thinking", "thinking": choice.text.reasoning, "signature": ""})
        if choice.text.content or not (blocks or choice.calls):
            blocks.append({"type": "text", "text": choice.text.content})
        for number, call in enumerate(choice.calls):
            blocks.append({**_tool_use(self._answer, number, call.name), "input": _input(call.arguments)})
        return {**_message(self._answer, blocks), **_stop(self._answer, choice.finish), "usage": _usage(self._answer)}

    def _events(self, chunks: Chunks) -> EventMaker:
        return MessageEvents(self._answer)


class MessageEvents:
    """Makes the events of a streamed message: blocks of content, one after the other."""

    end = b""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._text = CompletionText(answer.form)
        self._begun = False
        self._block = -1
        """Index of the open block, or of the last one."""
        self._kind = ""
        """Type of the open block."""

    def of(self, index: int, item: Piece | Finish) -> bytes:
        """See `EventMaker`."""
        events = b""
        if not self._begun:
            self._begun = True
            message = {**_message(self._answer, []), "stop_reason": None, "stop_sequence": None}
            usage = {**_usage(self._answer), "output_tokens": 0}
            events += _event("message_start", message={**message, "usage": usage})
        if isinstance(item, Piece):
            reasoning, deltas = self._text.feed(item.text)
            if reasoning:
                events += self._add("thinking", reasoning)
            return events + self._deltas(deltas)
        events += self._deltas(self._text.finish())
        if not self._kind:
            events += self._open("text", {"text": ""})
        events += self._close()
        usage = {"output_tokens": self._answer.usage.completion_tokens}
        stop = _stop(self._answer, self._text.finish_reason(item.value))
        events += _event("message_delta", delta=stop, usage=usage)
        return events + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        """See `EventMaker`."""
        return b"event: error\ndata: " + encode(error.body_at(MESSAGES_PATH)) + b"\n\n"

    def _deltas(self, deltas: Sequence[ToolDelta]) -> bytes:
        return b"".join(
            self._add("text", delta.text) if isinstance(delta, ContentDelta) else self._call(delta) for delta in deltas
        )

    def _call(self, delta: CallDelta) -> bytes:
        events = b""
        if delta.name is not None:
            events += self._close()
            events += self._open("tool_use", {**_tool_use(self._answer, delta.index, delta.name), "input": {}})
        if delta.arguments:
            events += self._delta({"type": "input_json_delta", "partial_json": delta.arguments})
        return events

    def _add(self, kind: str, text: str) -> bytes:
        """Add text to the open block of a kind, or open one."""
        events = b""
        if kind != self._kind:
            events += self._close()
            events += self._open(kind, {kind: "", **({"signature": ""} if kind == "thinking" else {})})
        return events + self._delta({"type": f"{kind}_delta", kind: text})

    def _delta(self, delta: Fields) -> bytes:
        return _event("content_block_delta", index=self._block, delta=delta)

    def _open(self, kind: str, block: Fields) -> bytes:
        self._block, self._kind = self._block + 1, kind
        return _event("content_block_start", index=self._block, content_block={"type": kind, **block})

    def _close(self) -> bytes:
        return _event("content_block_stop", index=self._block) if self._kind else b""


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"


def _message(answer: Answer, blocks: list[Fields]) -> Fields:
    return {
        "id": f"msg_{answer.id_suffix}",
        "type": "message",
        "role": "assistant",
        "model": answer.form.model,
        "content": blocks,
    }


def _tool_use(answer: Answer, number: int, name: str) -> Fields:
    """Return a block for a call, without its input."""
    assert answer.form.tools is not None
    return {"type": "tool_use", "id": answer.form.tools.calls.call_id(answer.answer_id, 0, number), "name": name}


def _input(arguments: str) -> Any:
    """Return the arguments of a call. If it was cut off, return the complete ones, as Anthropic's clients do."""
    try:
        return _in_range(from_json(arguments, allow_partial=True, allow_inf_nan=False))
    except ValueError:
        return {}


def _in_range(value: Any) -> Any:
    """Return parsed JSON with the largest float for numbers beyond it, which the parser reads as infinity."""
    if isinstance(value, float):
        return max(-float_info.max, min(float_info.max, value))
    if isinstance(value, dict):
        return {name: _in_range(one) for name, one in value.items()}
    return [_in_range(one) for one in value] if isinstance(value, list) else value


def _stop(answer: Answer, finish: str) -> Fields:
    """Return the reason of the end, and the stop sequence that was found."""
    found = answer.running[0].completion.stops.hit
    if finish == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    reason = "max_tokens" if finish == Finish.LENGTH else "end_turn" if found is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": found}


def _usage(answer: Answer) -> Fields:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
