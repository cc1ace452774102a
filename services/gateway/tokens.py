"""vLLM's `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, PlainValidator
from pydantic_core import PydanticCustomError

from services.gateway.body import Body, or_default, parse, read_body
from services.gateway.errors import invalid
from services.gateway.gateway import Gateway
from services.gateway.option_values import token_ids
from services.gateway.prompt import Limits, chat_tokens, prompt_tokens
from services.gateway.request import check_model
from services.gateway.schema import ChatRequest


class TokenizeText(Body):
    """POST /tokenize with a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: Annotated[bool, or_default(True)] = True
    return_token_strs: Annotated[bool, or_default(False)] = False


class TokenizeChat(ChatRequest):
    """POST /tokenize with a conversation."""

    model: str = ""
    return_token_strs: Annotated[bool, or_default(False)] = False


def _given(tokens: list[int] | None) -> list[int]:
    if tokens is None:
        raise PydanticCustomError("token_ids_type", "must be a list of token ids")
    return tokens


class Detokenize(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(token_ids, json_schema_input_type=list[int]), AfterValidator(_given)]


def add_tokens(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes that tokenize texts and conversations, and detokenize tokens."""
    tokenizer, folder = gateway.model.tokenizer, gateway.model.folder

    @app.post("/tokenize")
    async def tokenize(request: Request) -> JSONResponse:
        body = await read_body(gateway.settings, request)
        limits = Limits(folder.max_len, folder.vocab_size)
        asked: TokenizeChat | TokenizeText
        if b'"messages"' in body:
            asked = parse(TokenizeChat, body)
            tokens = await chat_tokens(tokenizer, limits, asked)
        else:
            asked = parse(TokenizeText, body)
            tokens = await prompt_tokens(tokenizer, limits, asked.prompt, special=asked.add_special_tokens)
        if asked.model:
            check_model(gateway, asked.model)
        fields: dict[str, Any] = {"count": len(tokens), "max_model_len": folder.max_len, "tokens": tokens}
        fields["token_strs"] = [tokenizer.token_text(token) for token in tokens] if asked.return_token_strs else None
        return JSONResponse(fields)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> JSONResponse:
        asked = parse(Detokenize, await read_body(gateway.settings, request))
        if asked.model:
            check_model(gateway, asked.model)
        if strays := [token for token in asked.tokens if not 0 <= token < folder.vocab_size]:
            text = f"tokens: id {strays[0]} is outside the vocabulary of {folder.vocab_size} tokens"
            raise invalid(text, "tokens")
        return JSONResponse({"prompt": tokenizer.decode(asked.tokens)})
