"""The OpenAPI document of the API: its routes, bodies, answers and errors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from services.gateway.keys import is_open
from services.gateway.messages_body import CountRequest, MessagesRequest
from services.gateway.responses_body import ResponsesRequest
from services.gateway.schema import ChatRequest, CompletionRequest
from services.gateway.tokens import Detokenize, TokenizeChat, TokenizeText

Schema = dict[str, Any]

TITLE = "WISP gateway"
DESCRIPTION = (
    "The API of the gateway. The page (`/`, `/page/`), its documentation (`/docs`) and its feed of the fleet view "
    "(`/fleet/events`) are not described here: they are for browsers."
)
ERRORS = {
    400: "The request is wrong; sending it again unchanged does not help.",
    401: "The API key is missing or unknown.",
    403: "The Host header names no server that is served without keys.",
    404: "There is no such path, model or stream.",
    405: "The path does not take this method.",
    408: "The body did not arrive in time.",
    413: "The body is longer than the gateway takes.",
    415: "The body has another type or encoding than the gateway takes.",
    429: "The load or a limit of the key is too high; try again after Retry-After seconds.",
    500: "A defect; its cause is in the gateway's log under the request's id.",
    503: "A service that is needed is away; try again after Retry-After seconds.",
    504: "Nobody worked on the request for too long.",
}
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
READ = (401, 403, 405, 500)
"""Errors of what is read."""
WRITE = (400, 401, 403, 404, 405, 408, 413, 415, 500)
"""Errors of bodies."""
WORK = (429, 503, 504)
"""Errors of generation."""

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_ANYTHING: Schema = {"type": "object"}


@cache
def document(version: str, *, keys: bool) -> Schema:
    """Return the document, which the first call makes in a tenth of a second. keys: the API requires keys."""
    fields: Schema = {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "description": DESCRIPTION, "version": version},
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }
    if keys:
        fields["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        fields["security"] = [{"key": []}]
    return fields


def _paths() -> Schema:
    paths = _operations()
    for path, operations in paths.items():
        for operation in operations.values() if is_open(path) else ():
            operation["security"] = []
            del operation["responses"]["401"]
    return paths


def _operations() -> Schema:
    """Return the operations by path, as if each required a key."""
    generation = (*WRITE, *WORK)
    streamed = {"application/json": "ChatCompletion", "text/event-stream": "Event"}
    stream_id = _parameter("answer_id", "path", {"type": "string"}, "The `id` of the streamed answer.")
    event_id = _parameter("Last-Event-ID", "header", _TEXT, "The id of the last event that was received.")
    name = _parameter("name", "path", _TEXT, "The model's name.")
    return {
        "/v1/chat/completions": {
            "post": _operation("Answer a conversation", streamed, generation, body="ChatRequest", parameters=[event_id])
        },
        "/v1/completions": {
            "post": _operation(
                "Continue a text",
                {"application/json": "Completion", "text/event-stream": "Event"},
                generation,
                body="CompletionRequest",
                parameters=[event_id],
            )
        },
        "/v1/streams/{answer_id}": {
            "get": _operation(
                "Resume a broken stream",
                {"text/event-stream": "Event"},
                (400, 404, *READ, *WORK),
                parameters=[stream_id, event_id],
            )
        },
        "/v1/models": _read("List the served model", {"application/json": "ModelList"}, READ),
        "/v1/models/{name}": _read("Describe the served model", {"application/json": "Model"}, (404, *READ), [name]),
        "/v1/responses": {
            "post": _operation(
                "Answer an input, as OpenAI's Responses API does",
                {"application/json": "Response", "text/event-stream": "Event"},
                generation,
                body="ResponsesRequest",
            )
        },
        "/v1/messages": {
            "post": _operation(
                "Answer a conversation, as Anthropic's API does",
                {"application/json": "Message", "text/event-stream": "Event"},
                generation,
                body="MessagesRequest",
                error="MessagesError",
            )
        },
        "/v1/messages/count_tokens": {
            "post": _operation(
                "Count the tokens of a conversation",
                {"application/json": "MessageTokens"},
                WRITE,
                body="CountRequest",
                error="MessagesError",
            )
        },
        "/tokenize": {
            "post": _operation(
                "Tokenize a text or a conversation", {"application/json": "Tokens"}, WRITE, body="Tokenize"
            )
        },
        "/detokenize": {
            "post": _operation("Put tokens into text", {"application/json": "Text"}, WRITE, body="Detokenize")
        },
        "/health": _read("Report that the process runs", {"application/json": "Health"}, READ),
        "/ready": _ready(),
        "/metrics": _read("Prometheus metrics", {"text/plain": None}, READ),
        "/version": _read("Name the version", {"application/json": "Version"}, READ),
        "/openapi.json": _read("This document", {"application/json": "Anything"}, READ),
    }


def _ready() -> Schema:
    path = _read("Report whether requests are served", {"application/json": "Readiness"}, READ)
    for operation in path.values():
        body = {} if operation is path["head"] else {"content": _content({"application/json": "Readiness"})}
        operation["responses"]["503"] = {"description": "Requests are not served now.", **body}
    return path


def _read(
    summary: str, answers: Mapping[str, str | None], errors: tuple[int, ...], parameters: list[Schema] | None = None
) -> Schema:
    """Return the methods of a path that can be read."""
    get = _operation(summary, answers, errors, parameters=parameters or [])
    head = {
        **get,
        "summary": f"{summary}: the headers",
        "responses": {status: {"description": one["description"]} for status, one in get["responses"].items()},
    }
    return {"get": get, "head": head}


def _operation(
    summary: str,
    answers: Mapping[str, str | None],
    errors: tuple[int, ...],
    *,
    body: str | None = None,
    parameters: list[Schema] | None = None,
    error: str = "Error",
) -> Schema:
    operation: Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": _content(answers)},
            **{
                str(status): {"description": ERRORS[status], "content": _content({"application/json": error})}
                for status in sorted(set(errors))
            },
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _content({"application/json": body})}
    return operation


def _content(answers: Mapping[str, str | None]) -> Schema:
    """Return media types with the schemas of these names; None stands for text."""
    return {
        media_type: {"schema": _TEXT if name is None else {"$ref": f"#/components/schemas/{name}"}}
        for media_type, name in answers.items()
    }


def _parameter(name: str, place: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _schemas() -> Schema:
    """Return all schemas by name: those of bodies from the models that check them."""
    found: Schema = {}
    for body in BODIES:
        _add(found, body)
    found["Tokenize"] = {"anyOf": [{"$ref": f"#/components/schemas/{one}"} for one in ("TokenizeText", "TokenizeChat")]}
    nothing_or_text = _or_null(_TEXT)
    usage = _object(
        {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
        {
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
            "completion_tokens_details": _object(
                {},
                {
                    "reasoning_tokens": _COUNT,
                    "accepted_prediction_tokens": _COUNT,
                    "rejected_prediction_tokens": _COUNT,
                },
            ),
        },
    )
    tool_call = _object(
        {
            "id": _TEXT,
            "type": {"const": "function"},
            "function": _object({"name": _TEXT, "arguments": _TEXT}),
        }
    )
    message = _object(
        {"role": {"const": "assistant"}, "content": nothing_or_text},
        {"refusal": nothing_or_text, "reasoning_content": nothing_or_text, "tool_calls": _list(tool_call)},
    )
    of_message = [
        _object({"type": {"const": "text"}, "text": _TEXT}),
        _object({"type": {"const": "thinking"}, "thinking": _TEXT, "signature": _TEXT}),
        _object({"type": {"const": "tool_use"}, "id": _TEXT, "name": _TEXT, "input": {}}),
    ]
    item = {"id": _TEXT, "status": {"const": "completed"}}
    content = {"content": _list(_ANYTHING)}
    of_output = [
        _object({**item, "type": {"const": "message"}, "role": {"const": "assistant"}, **content}),
        _object({**item, "type": {"const": "reasoning"}, "summary": _list(_ANYTHING), **content}),
        _object({**item, "type": {"const": "function_call"}, "call_id": _TEXT, "name": _TEXT, "arguments": _TEXT}),
    ]
    common = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "usage": usage}
    more = {"system_fingerprint": _TEXT, "service_tier": _TEXT, "wisp": _ANYTHING, "metrics": _or_null(_ANYTHING)}
    logprobs = {"logprobs": _or_null(_ANYTHING)}
    choice = {"index": _COUNT, "finish_reason": {"enum": ["stop", "length"]}, **logprobs}
    of_chat = choice | {"finish_reason": {"enum": ["stop", "length", "tool_calls"]}, "message": message}
    model = _object(
        {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT, "max_model_len": _COUNT},
        {"root": _TEXT, "parent": nothing_or_text, "context_window": _COUNT, "capabilities": _ANYTHING},
    )
    return found | {
        "Error": _object(
            {
                "error": _object(
                    {"message": _TEXT, "type": _TEXT, "param": nothing_or_text, "code": nothing_or_text},
                )
            }
        ),
        "ChatCompletion": _object(
            {
                **common,
                "object": {"const": "chat.completion"},
                "choices": _list(_object(of_chat)),
            },
            {**more, "prompt_logprobs": _list(_or_null(_ANYTHING))},
        ),
        "Completion": _object(
            {
                **common,
                "object": {"const": "text_completion"},
                "choices": _list(_object({**choice, "text": _TEXT}, {"prompt_logprobs": _list(_or_null(_ANYTHING))})),
            },
            more,
        ),
        "Message": _object(
            {
                "id": _TEXT,
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "model": _TEXT,
                "content": _list({"anyOf": of_message}),
                "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
                "stop_sequence": nothing_or_text,
                "usage": _object(
                    {
                        "input_tokens": _COUNT,
                        "cache_creation_input_tokens": _COUNT,
                        "cache_read_input_tokens": _COUNT,
                        "output_tokens": _COUNT,
                    }
                ),
            }
        ),
        "Response": _object(
            {
                "id": _TEXT,
                "object": {"const": "response"},
                "created_at": _COUNT,
                "status": {"enum": ["completed", "incomplete"]},
                "model": _TEXT,
                "output": _list({"anyOf": of_output}),
                "text": _ANYTHING,
                "usage": _object(
                    {
                        "input_tokens": _COUNT,
                        "input_tokens_details": _object({"cached_tokens": _COUNT}),
                        "output_tokens": _COUNT,
                        "output_tokens_details": _object({"reasoning_tokens": _COUNT}),
                        "total_tokens": _COUNT,
                    }
                ),
            }
        ),
        "MessageTokens": _object({"input_tokens": _COUNT}),
        "MessagesError": _object({"type": {"const": "error"}, "error": _object({"type": _TEXT, "message": _TEXT})}),
        "Model": model,
        "ModelList": _object({"object": {"const": "list"}, "data": _list(model)}),
        "Tokens": _object(
            {
                "count": _COUNT,
                "max_model_len": _COUNT,
                "tokens": _list(_COUNT),
                "token_strs": _or_null(_list(_TEXT)),
            }
        ),
        "Text": _object({"prompt": _TEXT}),
        # Before version 3.2 of OpenAPI, the schema of a stream is by convention that of each event.
        "Event": _object({"data": _TEXT}, {"event": _TEXT, "id": _TEXT}),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object({"ready": _FLAG, "parts": _ANYTHING}, {"without_drafters": _list(_TEXT)}),
        "Version": _object({"version": _TEXT}),
        "Anything": _ANYTHING,
    }


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
