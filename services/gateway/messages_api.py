"""Anthropic's Messages API: `/v1/messages`, whole or streamed, and its count of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from services.gateway.answer import Answer
from services.gateway.body import Body, or_default
from services.gateway.core.completion import Piece, Token
from services.gateway.core.options import MESSAGES_OPTIONS, UnsupportedOption
from services.gateway.core.reasoning import SplitText
from services.gateway.errors import MESSAGES_PATH, ApiError, encode
from services.gateway.gateway import Gateway
from services.gateway.grammar import grammar_of
from services.gateway.keys import key_of
from services.gateway.prompt import Limits, chat_prompts, chat_tokens
from services.gateway.request import FindLimits, ReadBody, check_model, new_answer
from services.gateway.response import AnswerResponse, EventMaker, splitter_of
from services.gateway.schema import (
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ChatForm,
    ChatMessage,
    ChatRequest,
    ContentPart,
    parse,
)
from services.gateway.stream import Choice, Chunks, Fields
from shared.messages import Finish


class MessageParam(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[ContentPart]


class CountRequest(ChatForm):
    """POST /v1/messages/count_tokens, and what both bodies have."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = MESSAGES_OPTIONS
    without_effect = frozenset({"max_tokens", "temperature", "top_p", "top_k", "stream"})
    """Options of messages that do not change the number of tokens."""

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    system: str | list[ContentPart] | None = None

    def conversation(self) -> list[ChatMessage]:
        """Return the conversation as a chat's messages."""
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return system + [ChatMessage(role=one.role, content=one.content) for one in self.messages]

    def options(self) -> dict[str, Any]:
        """Return the chat options that both bodies have. An answer continues a last message of the assistant."""
        continues = self.messages[-1].role == "assistant"
        return {"model": self.model, "messages": self.conversation(), "continue_final_message": continues}

    def chat(self) -> ChatRequest:
        """Return the same request as a chat."""
        return ChatRequest(**self.options())


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), or_default(1.0)] = 1.0
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Field(max_length=MAX_STOPS),
        or_default([]),
    ] = Field(default_factory=list)
    stream: Annotated[bool, or_default(False)] = False

    def chat(self) -> ChatRequest:
        """Return the same request as a chat."""
        return ChatRequest(
            **self.options(),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
        )


def add_messages(app: FastAPI, gateway: Gateway, read_body: ReadBody, limits_of: FindLimits) -> None:
    """Add the routes of Anthropic's API."""
    tokenizer = gateway.model.tokenizer

    @app.post(MESSAGES_PATH)
    async def messages(request: Request) -> Response:
        started_s = monotonic()
        asked = parse(MessagesRequest, await read_body(request))
        check_model(gateway, asked.model)
        chat = asked.chat()
        limits = await limits_of(chat)
        prompts = await chat_prompts(tokenizer, limits, chat)
        grammar = await grammar_of(chat, gateway.model)
        key = key_of(request.scope)
        answer = new_answer(gateway, chat, request.headers, prompts, limits, key, started_s, grammar=grammar)
        return MessageResponse(gateway.sessions, gateway.ledger, answer)

    @app.post(f"{MESSAGES_PATH}/count_tokens")
    async def count_tokens(request: Request) -> JSONResponse:
        asked = parse(CountRequest, await read_body(request))
        check_model(gateway, asked.model)
        folder = gateway.model.folder
        tokens = await chat_tokens(tokenizer, Limits(folder.max_len, folder.vocab_size), asked.chat())
        return JSONResponse({"input_tokens": len(tokens)})


class MessageResponse(AnswerResponse):
    """The response to a request for a message."""

    def _object(self, chunks: Chunks, choices: Sequence[Choice], tokens: Sequence[Token]) -> Fields:
        (choice,) = choices
        blocks: list[Fields] = []
        if choice.text.reasoning:
            blocks.append({"type": "thinking", "thinking": choice.text.reasoning, "signature": ""})
        if choice.text.content or not blocks:
            blocks.append({"type": "text", "text": choice.text.content})
        return {**_message(self._answer, blocks), **_stop(self._answer, choice.finish), "usage": _usage(self._answer)}

    def _events(self, chunks: Chunks) -> EventMaker:
        return MessageEvents(self._answer)


class MessageEvents:
    """Makes the events of a streamed message: blocks of content, one after the other."""

    end = b""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._splitter = splitter_of(answer.form)
        self._begun = False
        self._block = -1
        """Index of the block that is open, or was last."""
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
            return events + self._text(self._splitter.feed(item.text))
        if not self._kind:
            events += self._open("text")
        events += self._close()
        usage = {"output_tokens": self._answer.usage.completion_tokens}
        events += _event("message_delta", delta=_stop(self._answer, item.value), usage=usage)
        return events + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        """See `EventMaker`."""
        return b"event: error\ndata: " + encode(error.body_at(MESSAGES_PATH)) + b"\n\n"

    def _text(self, text: SplitText) -> bytes:
        events = b""
        for kind, delta, part in (("thinking", "thinking_delta", text.reasoning), ("text", "text_delta", text.content)):
            if part:
                events += self._open(kind)
                events += _event("content_block_delta", index=self._block, delta={"type": delta, kind: part})
        return events

    def _open(self, kind: str) -> bytes:
        if kind == self._kind:
            return b""
        events = self._close()
        self._block, self._kind = self._block + 1, kind
        block = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
        return events + _event("content_block_start", index=self._block, content_block=block)

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


def _stop(answer: Answer, finish: str) -> Fields:
    """Return the reason of the end, and the stop sequence that was found."""
    found = answer.running[0].completion.stops.hit
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
