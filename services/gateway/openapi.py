"""The OpenAPI document of the API: its routes, their methods and errors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from services.drafter.sources.registry import CHOICES
from services.gateway.keys import is_open
from services.gateway.openapi_schemas import TEXT, Schema, schemas
from services.gateway.schema import DRAFT_HEADER, POOL_HEADER, TPOT_HEADERS, TTFT_HEADERS
from shared.messages import LONGEST_MS, SHORTEST_MS
from shared.runtime.settings import NAME_PATTERN

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
READ = (401, 403, 405, 500)
"""Errors of what is read."""
WRITE = (400, 401, 403, 404, 405, 408, 413, 415, 500)
"""Errors of bodies."""
WORK = (429, 503, 504)
"""Errors of generation."""


@cache
def document(version: str, *, keys: bool) -> Schema:
    """Return the document, which the first call makes in a tenth of a second. keys: the API requires keys."""
    fields: Schema = {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "description": DESCRIPTION, "version": version},
        "paths": _paths(),
        "components": {"schemas": schemas()},
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
    name = _parameter("name", "path", TEXT, "The model's name.")
    return {
        **_generation(),
        "/v1/models": _read("List the served model", {"application/json": "ModelList"}, READ),
        "/v1/models/{name}": _read("Describe the served model", {"application/json": "Model"}, (404, *READ), [name]),
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


def _generation() -> Schema:
    """Return the operations that generate text, by path."""
    errors = (*WRITE, *WORK)
    answer_id = _parameter("answer_id", "path", {"type": "string"}, "The `id` of the streamed answer.")
    event_id = _parameter("Last-Event-ID", "header", TEXT, "The id of the last event that was received.")
    options = _header_options()

    def streamed(answer: str) -> dict[str, str | None]:
        return {"application/json": answer, "text/event-stream": "Event"}

    return {
        "/v1/chat/completions": {
            "post": _operation(
                "Answer a conversation",
                streamed("ChatCompletion"),
                errors,
                body="ChatRequest",
                parameters=[event_id, *options],
            )
        },
        "/v1/completions": {
            "post": _operation(
                "Continue a text",
                streamed("Completion"),
                errors,
                body="CompletionRequest",
                parameters=[event_id, *options],
            )
        },
        "/v1/streams/{answer_id}": {
            "get": _operation(
                "Resume a broken stream",
                {"text/event-stream": "Event"},
                (400, 404, *READ, *WORK),
                parameters=[answer_id, event_id],
            )
        },
        "/v1/responses": {
            "post": _operation(
                "Answer an input, as OpenAI's Responses API does",
                streamed("Response"),
                errors,
                body="ResponsesRequest",
                parameters=options,
            )
        },
        "/v1/messages": {
            "post": _operation(
                "Answer a conversation, as Anthropic's API does",
                streamed("Message"),
                errors,
                body="MessagesRequest",
                parameters=options,
                error="MessagesError",
            )
        },
    }


def _header_options() -> list[Schema]:
    """Return the headers that `HeaderOptions` reads, as parameters of an operation."""
    number: Schema = {"type": "number", "minimum": SHORTEST_MS, "maximum": LONGEST_MS}
    pool: Schema = {"type": "string", "pattern": NAME_PATTERN}
    return [
        *(_parameter(name, "header", number, "SLO: milliseconds to the first token.") for name in TTFT_HEADERS),
        *(_parameter(name, "header", number, "SLO: milliseconds per further token.") for name in TPOT_HEADERS),
        _parameter(
            DRAFT_HEADER, "header", {"enum": list(CHOICES)}, "The draft source; the option `wisp.draft` overrides it."
        ),
        _parameter(POOL_HEADER, "header", pool, "The pool of drafters; the option `wisp.pool` overrides it."),
    ]


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
        media_type: {"schema": TEXT if name is None else {"$ref": f"#/components/schemas/{name}"}}
        for media_type, name in answers.items()
    }


def _parameter(name: str, place: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}
