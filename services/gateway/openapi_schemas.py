"""The schemas of the OpenAPI document: bodies from the models that check them, and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from services.gateway.messages_body import CountRequest, MessagesRequest
from services.gateway.responses_body import ResponsesRequest
from services.gateway.schema import ChatRequest, CompletionRequest
from services.gateway.tokens import Detokenize, TokenizeChat, TokenizeText

Schema = dict[str, Any]

BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    TokenizeText,
    TokenizeChat,
    Detokenize,
    CountRequest,
    MessagesRequest,
    ResponsesRequest,
)

TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_ANYTHING: Schema = {"type": "object"}


def schemas() -> Schema:
    """Return all schemas by name."""
    return {**_bodies(), **_completions(), **_message(), **_response(), **_others()}


def _bodies() -> Schema:
    found: Schema = {}
    for body in BODIES:
        _add(found, body)
    found["Tokenize"] = {"anyOf": [{"$ref": f"#/components/schemas/{one}"} for one in ("TokenizeText", "TokenizeChat")]}
    return found


def _add(found: Schema, model: type[BaseModel]) -> None:
    """Add a model's schema and those of its parts. Options may be null, which means their default."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    for name, part in {**parts, model.__name__: schema}.items():
        required = part.get("required", [])
        for option, of_option in part.get("properties", {}).items():
            of_option.pop("default", None)
            if option not in required and {"type": "null"} not in of_option.get("anyOf", []):
                part["properties"][option] = _or_null(of_option)
        found[name] = part


def _completions() -> Schema:
    """Return the answers and errors of OpenAI's API for chats and texts."""
    common = {"id": TEXT, "created": _COUNT, "model": TEXT, "usage": _usage()}
    more = {"system_fingerprint": TEXT, "service_tier": TEXT, "wisp": _ANYTHING, "metrics": _or_null(_ANYTHING)}
    logprobs = {"logprobs": _or_null(_ANYTHING)}
    choice = {"index": _COUNT, "finish_reason": {"enum": ["stop", "length"]}, **logprobs}
    of_chat = choice | {"finish_reason": {"enum": ["stop", "length", "tool_calls"]}, "message": _chat_message()}
    of_prompt = {"prompt_logprobs": _list(_or_null(_ANYTHING))}
    error = _object({"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)})
    return {
        "Error": _object({"error": error}),
        "ChatCompletion": _object(
            {**common, "object": {"const": "chat.completion"}, "choices": _list(_object(of_chat))},
            {**more, **of_prompt},
        ),
        "Completion": _object(
            {
                **common,
                "object": {"const": "text_completion"},
                "choices": _list(_object({**choice, "text": TEXT}, of_prompt)),
            },
            more,
        ),
    }


def _usage() -> Schema:
    completion = {
        "reasoning_tokens": _COUNT,
        "accepted_prediction_tokens": _COUNT,
        "rejected_prediction_tokens": _COUNT,
    }
    return _object(
        {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
        {
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
            "completion_tokens_details": _object({}, completion),
        },
    )


def _chat_message() -> Schema:
    tool_call = _object(
        {"id": TEXT, "type": {"const": "function"}, "function": _object({"name": TEXT, "arguments": TEXT})}
    )
    return _object(
        {"role": {"const": "assistant"}, "content": _or_null(TEXT)},
        {"refusal": _or_null(TEXT), "reasoning_content": _or_null(TEXT), "tool_calls": _list(tool_call)},
    )


def _message() -> Schema:
    """Return the answers and errors of Anthropic's API."""
    blocks = [
        _object({"type": {"const": "text"}, "text": TEXT}),
        _object({"type": {"const": "thinking"}, "thinking": TEXT, "signature": TEXT}),
        _object({"type": {"const": "tool_use"}, "id": TEXT, "name": TEXT, "input": {}}),
    ]
    usage = _object(
        {
            "input_tokens": _COUNT,
            "cache_creation_input_tokens": _COUNT,
            "cache_read_input_tokens": _COUNT,
            "output_tokens": _COUNT,
        }
    )
    return {
        "Message": _object(
            {
                "id": TEXT,
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "model": TEXT,
                "content": _list({"anyOf": blocks}),
                "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
                "stop_sequence": _or_null(TEXT),
                "usage": usage,
            }
        ),
        "MessageTokens": _object({"input_tokens": _COUNT}),
        "MessagesError": _object({"type": {"const": "error"}, "error": _object({"type": TEXT, "message": TEXT})}),
    }


def _response() -> Schema:
    """Return the answer of OpenAI's Responses API."""
    item = {"id": TEXT, "status": {"const": "completed"}}
    content = {"content": _list(_ANYTHING)}
    items = [
        _object({**item, "type": {"const": "message"}, "role": {"const": "assistant"}, **content}),
        _object({**item, "type": {"const": "reasoning"}, "summary": _list(_ANYTHING), **content}),
        _object({**item, "type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT}),
    ]
    usage = _object(
        {
            "input_tokens": _COUNT,
            "input_tokens_details": _object({"cached_tokens": _COUNT}),
            "output_tokens": _COUNT,
            "output_tokens_details": _object({"reasoning_tokens": _COUNT}),
            "total_tokens": _COUNT,
        }
    )
    return {
        "Response": _object(
            {
                "id": TEXT,
                "object": {"const": "response"},
                "created_at": _COUNT,
                "status": {"enum": ["completed", "incomplete"]},
                "model": TEXT,
                "output": _list({"anyOf": items}),
                "text": _ANYTHING,
                "usage": usage,
            }
        )
    }


def _others() -> Schema:
    """Return the answers about models, tokens and the server itself, and the events of streams."""
    model = _object(
        {"id": TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": TEXT, "max_model_len": _COUNT},
        {"root": TEXT, "parent": _or_null(TEXT), "context_window": _COUNT, "capabilities": _ANYTHING},
    )
    return {
        "Model": model,
        "ModelList": _object({"object": {"const": "list"}, "data": _list(model)}),
        "Tokens": _object(
            {"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT), "token_strs": _or_null(_list(TEXT))}
        ),
        "Text": _object({"prompt": TEXT}),
        # Before version 3.2 of OpenAPI, the schema of a stream is by convention that of each event.
        "Event": _object({"data": TEXT}, {"event": TEXT, "id": TEXT}),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object({"ready": _FLAG, "parts": _ANYTHING}, {"without_drafters": _list(TEXT)}),
        "Version": _object({"version": TEXT}),
        "Anything": _ANYTHING,
    }


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}
