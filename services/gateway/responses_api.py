"""OpenAI's Responses API: `/v1/responses`, whole or streamed, with function tools and stored conversations."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

import msgpack
from fastapi import FastAPI, Request
from fastapi.responses import Response

from services.gateway.answer import Answer, Usage
from services.gateway.body import parse, read_body
from services.gateway.core.completion import Piece, Token
from services.gateway.core.tool_calls import CallDelta, ContentDelta, ToolDelta
from services.gateway.errors import ApiError, invalid, unavailable
from services.gateway.gateway import Gateway
from services.gateway.keys import ApiKey, key_of
from services.gateway.request import accept, check_model
from services.gateway.response import AnswerResponse, CompletionText, EventMaker
from services.gateway.responses_body import Messages, ResponsesRequest, messages_of
from services.gateway.stream import Choice, Chunks, Fields, encode
from shared.errors import BrokersError, quoted
from shared.messages import Finish

MOST_RESPONSES = 256
"""Responses whose items one input may refer to."""
_ITEM_ID = re.compile(r"(?:msg|rs|fc)_([0-9a-f]{1,64})(?:_\d+)?")
"""Id of an item, with the end of its response's id."""


def add_responses(app: FastAPI, gateway: Gateway) -> None:
    """Add the route of the Responses API."""

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        started_s = monotonic()
        asked = parse(ResponsesRequest, await read_body(gateway.settings, request))
        check_model(gateway, asked.model)
        stored = StoredResponses(gateway, key_of(request.scope))
        items = [await stored.item(item, f"input[{number}].id") for number, item in enumerate(asked.items)]
        messages = [*await stored.conversation(asked.previous_response_id), *messages_of(items, "input")]
        answer = await accept(gateway, request, asked.chat(messages), started_s)

        async def keep(output: Sequence[Fields]) -> None:
            if asked.store:
                conversation = [*messages, *messages_of(output, "output")]
                record = {"holder": answer.form.holder, "messages": conversation, "output": output}
                await gateway.transport.store_response(_response_id(answer), msgpack.packb(record))

        return ResponsesResponse(gateway, answer, asked, keep)


class StoredResponses:
    """The stored responses that a request names. Those of other API keys count as missing."""

    def __init__(self, gateway: Gateway, key: ApiKey | None) -> None:
        self._gateway = gateway
        self._holder = None if key is None else key.id
        self._read: dict[str, Fields | None] = {}
        """Records by response id; None for a response that is not found."""

    async def conversation(self, response_id: str | None) -> Messages:
        """Return the conversation up to a response. Raises ApiError."""
        if response_id is None:
            return []
        if (record := await self._record(response_id)) is None:
            text = f"the response {quoted(response_id)} is not stored, or no longer; send its conversation as input"
            raise ApiError(404, text, code="previous_response_not_found", param="previous_response_id")
        messages: Messages = record["messages"]
        return messages

    async def item(self, item: Fields, where: str) -> Fields:
        """Return the item that a reference names; other items stay. where: its name in errors. Raises ApiError."""
        if item.get("type") != "item_reference":
            return item
        item_id = str(item.get("id"))
        found = _ITEM_ID.fullmatch(item_id)
        record = None if found is None else await self._record(f"resp_{found[1]}")
        for one in [] if record is None else record.get("output", []):
            if one["id"] == item_id:
                stored: Fields = one
                return stored
        text = f"{where}: the item {quoted(item_id)} is not stored, or no longer; send the item itself"
        raise ApiError(404, text, code="item_not_found", param=where)

    async def _record(self, response_id: str) -> Fields | None:
        if response_id not in self._read:
            if len(self._read) >= MOST_RESPONSES:
                text = f"input refers to items of more than {MOST_RESPONSES} responses; send some items themselves"
                raise invalid(text, "input")
            try:
                stored = await self._gateway.transport.stored_response(response_id[:128])
            except BrokersError as error:
                raise unavailable(str(error), "redis_unavailable", retry_after_s=2) from error
            record = None if stored is None else msgpack.unpackb(stored)
            is_own = record is not None and record["holder"] == self._holder
            self._read[response_id] = record if is_own else None
        return self._read[response_id]


class ResponsesResponse(AnswerResponse):
    """The response to a request of the Responses API."""

    def __init__(
        self,
        gateway: Gateway,
        answer: Answer,
        asked: ResponsesRequest,
        keep: Callable[[Sequence[Fields]], Awaitable[None]],
    ) -> None:
        """keep: stores the conversation with the answer's items; it is called when they are complete."""
        super().__init__(gateway.sessions, gateway.ledger, answer)
        self._asked = asked
        self._keep = keep
        self._kept = False

    def _object(self, chunks: Chunks, choices: Sequence[Choice], tokens: Sequence[Token]) -> Fields:
        (choice,) = choices
        output: list[Fields] = []
        if choice.text.reasoning:
            output.append(_reasoning_item(self._answer, choice.text.reasoning))
        if choice.text.content or not (output or choice.calls):
            output.append(_message_item(self._answer, choice.text.content))
        for number, call in enumerate(choice.calls):
            output.append(_call_item(self._answer, number, call.name, call.arguments))
        return self._finished(output, choice.finish)

    async def _before_end(self, fields: Fields | None, events: EventMaker | None) -> None:
        if isinstance(events, ResponseEvents):
            output = events.output if events.complete else None
        else:
            output = None if fields is None else fields["output"]
        if output is None or self._kept:
            return
        self._kept = True
        try:
            await self._keep(output)
        except BrokersError as error:
            raise unavailable(str(error), "redis_unavailable", retry_after_s=2) from error

    def _finished(self, output: list[Fields], finish: str) -> Fields:
        status = "incomplete" if finish == Finish.LENGTH else "completed"
        return {**self._fields(status, output), "usage": _usage(self._answer.usage)}

    def _fields(self, status: str, output: list[Fields]) -> Fields:
        """Return the response object without usage, which only a complete one has."""
        asked, answer = self._asked, self._answer
        return {
            "id": _response_id(answer),
            "object": "response",
            "created_at": answer.form.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": answer.form.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": asked.store,
            "temperature": asked.temperature,
            "text": asked.text.shown(),
            "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _events(self, chunks: Chunks) -> EventMaker:
        return ResponseEvents(self._answer, self._fields, self._finished)


class ResponseEvents:
    """Makes the events of a streamed response: its items, one after the other, each from its first text to its end."""

    end = b""

    def __init__(
        self, answer: Answer, fields: Callable[..., Fields], finished: Callable[[list[Fields], str], Fields]
    ) -> None:
        self._answer = answer
        self._fields = fields
        self._finished = finished
        self._text = CompletionText(answer.form)
        self._number = 0
        self.output: list[Fields] = []
        """Items that are complete."""
        self._item: Fields | None = None
        """The item that is open."""
        self.complete = False
        """True if the last item is complete."""

    def of(self, index: int, item: Piece | Finish) -> bytes:
        """See `EventMaker`."""
        events = b""
        if self._number == 0:
            for kind in ("response.created", "response.in_progress"):
                events += self._event(kind, response=self._fields("in_progress", []))
        if isinstance(item, Piece):
            reasoning, deltas = self._text.feed(item.text)
            if reasoning:
                events += self._add("reasoning", reasoning)
            return events + self._deltas(deltas)
        events += self._deltas(self._text.finish())
        if self._item is None and not self.output:
            events += self._add("message", "")
        events += self._close()
        self.complete = True
        response = self._finished(self.output, item.value)
        return events + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        """See `EventMaker`."""
        body = error.body()["error"]
        return self._event("error", code=body["code"], message=body["message"], param=body["param"])

    def _deltas(self, deltas: Sequence[ToolDelta]) -> bytes:
        events = b""
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                events += self._add("message", delta.text) if delta.text else b""
            else:
                events += self._call(delta)
        return events

    def _call(self, delta: CallDelta) -> bytes:
        events = b""
        if delta.name is not None:
            events += self._open(_call_item(self._answer, delta.index, delta.name, ""))
        assert self._item is not None
        if delta.arguments:
            self._item["arguments"] += delta.arguments
            events += self._part("response.function_call_arguments.delta", delta=delta.arguments)
        return events

    def _add(self, kind: str, text: str) -> bytes:
        """Add text to the open item of a kind, or open one."""
        events = b""
        if self._item is None or self._item["type"] != kind:
            make = _message_item if kind == "message" else _reasoning_item
            before = sum(one["type"] == kind for one in [*self.output, *([self._item] if self._item else [])])
            events += self._open(make(self._answer, "", before))
        assert self._item is not None
        if kind == "message":
            if not self._item["content"][0]["text"]:
                part = {"type": "output_text", "text": "", "annotations": []}
                events += self._part("response.content_part.added", content_index=0, part=part)
            if text:
                events += self._part("response.output_text.delta", content_index=0, delta=text, logprobs=[])
        elif text:
            events += self._part("response.reasoning_text.delta", content_index=0, delta=text)
        self._item["content"][0]["text"] += text
        return events

    def _open(self, item: Fields) -> bytes:
        events = self._close()
        self._item = item
        shown = {**item, "status": "in_progress"} | ({"content": []} if "content" in item else {})
        return events + self._event("response.output_item.added", output_index=len(self.output), item=shown)

    def _close(self) -> bytes:
        """End the open item."""
        if (item := self._item) is None:
            return b""
        events = b""
        if item["type"] == "message":
            text = item["content"][0]["text"]
            events += self._part("response.output_text.done", content_index=0, text=text, logprobs=[])
            events += self._part("response.content_part.done", content_index=0, part=item["content"][0])
        elif item["type"] == "reasoning":
            events += self._part("response.reasoning_text.done", content_index=0, text=item["content"][0]["text"])
        else:
            fields = {"name": item["name"], "arguments": item["arguments"]}
            events += self._part("response.function_call_arguments.done", **fields)
        events += self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._item = None
        return events

    def _part(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self.output), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        body = {"type": kind, "sequence_number": self._number - 1, **fields}
        return b"event: " + kind.encode() + b"\ndata: " + encode(body) + b"\n\n"


def _response_id(answer: Answer) -> str:
    return f"resp_{answer.id_suffix}"


def _message_item(answer: Answer, text: str, before: int = 0) -> Fields:
    """Return an item with text. before: items of this type before it."""
    return {
        "id": _item_id("msg", answer, before),
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }


def _item_id(prefix: str, answer: Answer, before: int) -> str:
    return f"{prefix}_{answer.id_suffix}" + (f"_{before}" if before else "")


def _reasoning_item(answer: Answer, text: str, before: int = 0) -> Fields:
    """Return an item with reasoning. before: items of this type before it."""
    return {
        "id": _item_id("rs", answer, before),
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def _call_item(answer: Answer, number: int, name: str, arguments: str) -> Fields:
    assert answer.form.tools is not None
    return {
        "id": f"fc_{answer.id_suffix}_{number}",
        "type": "function_call",
        "status": "completed",
        "call_id": answer.form.tools.calls.call_id(answer.answer_id, 0, number),
        "name": name,
        "arguments": arguments,
    }


def _usage(usage: Usage) -> Fields:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.total,
    }
