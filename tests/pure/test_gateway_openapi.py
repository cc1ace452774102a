"""The OpenAPI document: every route, every option and every error that the gateway has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.routing import APIRoute
from gateway_app import HELLO, MODEL, App
from gateway_peer import Script
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_gateway_tools import WEATHER
from test_gateway_tools import served as served_with_tools

from services.gateway.openapi import document
from services.gateway.schema import ChatRequest, CompletionRequest

DOCUMENT = document("1", keys=False)
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def problems(value: Any, schema: dict[str, Any], where: str = "$") -> Iterator[str]:
    """Yield where a value is not what its schema says: the keywords that the document uses."""
    if "$ref" in schema:
        yield from problems(value, SCHEMAS[schema["$ref"].rpartition("/")[2]], where)
        return
    if "anyOf" in schema:
        if all(list(problems(value, one, where)) for one in schema["anyOf"]):
            yield f"{where}: none of anyOf"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        yield f"{where}: {value!r} is no {kind}"
        return
    if kind == "object":
        for name in schema.get("required", []):
            if name not in value:
                yield f"{where}.{name} is missing"
        for name, one in schema.get("properties", {}).items():
            if name in value:
                yield from problems(value[name], one, f"{where}.{name}")
    if kind == "array":
        for number, one in enumerate(value):
            yield from problems(one, schema.get("items", {}), f"{where}[{number}]")
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value} is below {schema['minimum']}"


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            if key == "$ref":
                yield one
            else:
                yield from refs(one)
    elif isinstance(value, list):
        for one in value:
            yield from refs(one)


def operation(method: str, path: str) -> dict[str, Any]:
    for template, methods in DOCUMENT["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method.lower() in methods:
            found: dict[str, Any] = methods[method.lower()]
            return found
    raise AssertionError(f"{method} {path} is not in the document")


def test_every_reference_leads_to_a_schema() -> None:
    assert {ref.rpartition("/")[2] for ref in refs(DOCUMENT)} <= SCHEMAS.keys()
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_every_option_is_described() -> None:
    for model in (ChatRequest, CompletionRequest):
        assert SCHEMAS[model.__name__]["properties"].keys() == model.model_fields.keys()
        assert all(one != {} for one in SCHEMAS[model.__name__]["properties"].values())


def test_keys_are_required_where_the_gateway_requires_them() -> None:
    assert "security" not in DOCUMENT
    assert document("1", keys=True)["security"] == [{"key": []}]


async def test_open_paths_need_no_key_and_all_others_do(guarded: tuple[App, str]) -> None:
    app, _ = guarded
    described = (await app.http.get("/openapi.json")).json()
    for path, methods in described["paths"].items():
        for method, one in methods.items():
            refused = (await app.http.request(method, path)).status_code == 401
            assert refused == ("401" in one["responses"]) == (one.get("security") != []), (method, path)


def test_routes_without_a_description_are_those_of_the_page(app: App) -> None:
    inner: Any = app.asgi
    while not isinstance(inner, FastAPI):
        inner = inner._app
    served = {route.path.replace(":path", "") for route in inner.routes if isinstance(route, APIRoute)}
    page = {"/", "/page/{name}", "/docs", "/docs/{path}", "/fleet/events"}
    assert served - DOCUMENT["paths"].keys() == page
    named = DOCUMENT["info"]["description"]
    assert all(f"`{path.partition('{')[0]}`" in named for path in page - {"/docs/{path}"})


async def test_calls_of_tools_are_those_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway_app.CONTEXT", 4096)
    async for one in served_with_tools(tmp_path):
        one.script = Script('{"name": "get_weather", "arguments": {"city": "Bonn"}}')
        answer = (await one.chat(tools=[WEATHER])).json()
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert list(problems(answer, {"$ref": "ChatCompletion"})) == []
        answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = {}
        assert list(problems(answer, {"$ref": "ChatCompletion"}))


async def test_every_route_is_in_the_document(app: App) -> None:
    served = (await app.http.get("/openapi.json")).json()
    assert served["paths"] == DOCUMENT["paths"]
    for path, methods in served["paths"].items():
        real = path.replace("{name}", MODEL).replace("{answer_id}", "x")
        allowed = (await app.http.options(real)).headers["allow"].split(", ")
        assert {method.upper() for method in methods} == set(allowed) - {"OPTIONS"}, path


REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{MODEL}", None),
    ("GET", "/v1/models/other", None),
    ("GET", "/v1/streams/none", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/metrics", None),
    ("GET", "/version", None),
    ("POST", "/v1/chat/completions", HELLO),
    ("POST", "/v1/chat/completions", HELLO | {"logprobs": True, "top_logprobs": 2, "wisp": {"metrics": True}}),
    ("POST", "/v1/chat/completions", HELLO | {"stream": True}),
    ("POST", "/v1/chat/completions", HELLO | {"prediction": {"type": "content", "content": "x"}}),
    ("POST", "/v1/chat/completions", {}),
    ("POST", "/v1/completions", {"model": MODEL, "prompt": "a", "echo": True, "logprobs": 1, "prompt_logprobs": 1}),
    ("POST", "/v1/completions", {"model": "other", "prompt": "a"}),
    ("POST", "/v1/messages", HELLO | {"max_tokens": 5}),
    ("POST", "/v1/messages", HELLO | {"max_tokens": 5, "stream": True}),
    ("POST", "/v1/messages", HELLO),
    ("POST", "/v1/responses", {"model": MODEL, "input": "Hi"}),
    ("POST", "/v1/responses", {"model": MODEL, "input": "Hi", "stream": True}),
    ("POST", "/v1/responses", {"model": MODEL, "input": [{"type": "input_image"}]}),
    ("POST", "/v1/messages/count_tokens", HELLO),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/tokenize", HELLO),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("POST", "/detokenize", {"tokens": [-5]}),
]


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
async def test_answers_are_those_of_the_document(app: App, method: str, path: str, body: Any) -> None:
    response = await app.http.request(method, path, json=body) if body is not None else await app.http.get(path)
    described = operation(method, path)
    assert str(response.status_code) in described["responses"]
    if body is not None and response.status_code == 200:
        name = described["requestBody"]["content"]["application/json"]["schema"]
        assert list(problems(body, name)) == []
    media_type = response.headers["content-type"].partition(";")[0]
    content = described["responses"][str(response.status_code)]["content"]
    assert media_type in content
    if media_type == "application/json":
        assert list(problems(response.json(), content[media_type]["schema"])) == []


BASES: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/chat/completions", "ChatRequest"): HELLO,
    ("/v1/completions", "CompletionRequest"): {"model": MODEL, "prompt": "x"},
    ("/v1/messages", "MessagesRequest"): HELLO | {"max_tokens": 5},
    ("/v1/messages/count_tokens", "CountRequest"): HELLO,
    ("/v1/responses", "ResponsesRequest"): {"model": MODEL, "input": "x"},
    ("/tokenize", "TokenizeText"): {"prompt": "x"},
    ("/tokenize", "TokenizeChat"): HELLO,
    ("/detokenize", "Detokenize"): {"tokens": [5]},
}
"""By path and schema of the body: a body that is answered."""
TOGETHER = 5
GROUPS = [
    (path, schema, first) for path, schema in BASES for first in range(0, len(SCHEMAS[schema]["properties"]), TOGETHER)
]
"""Options are tried in groups of `TOGETHER`: among all of them, nearly every drawn body has a wrong one."""
READS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods if method != "post"]
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
some = hypothesis_settings(
    max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


def drawn(path: str, method: str, body: dict[str, Any] | None, mode: GenerationMode) -> st.SearchStrategy[Case]:
    """Return requests of an operation. body: the schema of their bodies, instead of the document's."""
    operation = DOCUMENT["paths"][path][method]
    if body is not None:
        operation = operation | {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
    schema = schemathesis.openapi.from_dict(DOCUMENT | {"paths": {path: {method: operation}}})
    return schema[path][method].as_strategy(mode)


@cache
def requests_of(group: tuple[str, str, int], mode: GenerationMode) -> st.SearchStrategy[Case]:
    """Return requests with a group of options, and what else an answer needs."""
    path, name, first = group
    properties = list(SCHEMAS[name]["properties"].items())[first : first + TOGETHER]
    needed = {option: {"const": value} for option, value in BASES[path, name].items()}
    model = {"model": needed["model"]} if "model" in needed else {}
    body = {"type": "object", "properties": needed | dict(properties) | model, "required": list(needed)}
    return drawn(path, "post", body, mode)


async def check(app: App, case: Case) -> None:
    """Send a request, and check that the document describes its answer."""
    sent = case.as_transport_kwargs(base_url="http://127.0.0.1:8000")
    response = await app.http.request(
        sent["method"],
        sent["url"],
        params=sent.get("params"),
        headers={**(sent.get("headers") or {}), "content-type": "application/json"},
        **({"json": sent["json"]} if "json" in sent else {"content": sent.get("data")}),
    )
    # A drawn name of a pool has no drafters.
    is_pool = response.status_code == 503 and "no drafter is running in pool" in response.json()["error"]["message"]
    case.validate_response(response, checks=CHECKS if is_pool else [not_a_server_error, *CHECKS])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group[1]}-{group[2]}")
@some
@given(data=st.data())
async def test_any_body_has_a_documented_answer(
    app: App,
    group: tuple[str, str, int],
    mode: GenerationMode,
    data: st.DataObject,
) -> None:
    await check(app, data.draw(requests_of(group, mode)))


@pytest.mark.slow
@some
@given(data=st.data())
async def test_all_that_is_read_has_a_documented_answer(app: App, data: st.DataObject) -> None:
    for path, method in READS:
        await check(app, data.draw(drawn(path, method, None, GenerationMode.POSITIVE)))
