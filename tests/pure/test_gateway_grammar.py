"""Structured output at the gateway: the options of OpenAI's and vLLM's clients, and what they make of a session."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from gateway_app import HELLO, MODEL, App, error_of
from gateway_peer import Script
from test_gateway_tools import HERMES_TEMPLATE, WEATHER, client, served

from services.gateway.body import parse
from services.gateway.errors import ApiError
from services.gateway.schema import ChatRequest, CompletionRequest
from shared.errors import GrammarError
from shared.grammar.masks import Grammars
from shared.messages import GRAMMAR, Generate, features_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
JSON_TEXT = '{"city": "Bonn", "days": 3}'


@pytest.fixture(autouse=True)
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway_app.CONTEXT", 4096)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async for app in served(tmp_path):
        yield app


@pytest.fixture
async def hermes(tmp_path: Path) -> AsyncIterator[App]:
    async for app in served(tmp_path, HERMES_TEMPLATE):
        yield app


def follows(app: App, generate: Generate, text: str) -> bool:
    """Return whether a text is a complete answer of the session's grammar."""
    grammar = generate.sampling.grammar
    assert grammar is not None
    assert grammar.prompt_len == len(generate.prompt)
    assert features_of(generate.fingerprint) == {GRAMMAR}
    grammars = Grammars.of(app.gateway.model.folder)
    try:
        grammars.session("s", grammar).after([*app.tokenizer.encode(text), *generate.stop_ids])
    except GrammarError:
        return False
    return True


OPTIONS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
        [JSON_TEXT],
        ['{"city": "Bonn"}', '{"city":"Bonn","days":3}', "Bonn"],
    ),
    ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1"]),
    ({"guided_json": SCHEMA}, [JSON_TEXT], ['{"city": 1, "days": 3}']),
    ({"guided_json": json.dumps(SCHEMA)}, [JSON_TEXT], ["{}"]),
    ({"guided_regex": r"a+\d"}, ["aa1"], ["a", "aa1x"]),
    ({"guided_choice": ["yes", "no"]}, ["yes", "no"], ["maybe"]),
    ({"guided_grammar": 'root ::= "x" | "y"'}, ["x", "y"], ["z"]),
    ({"structured_outputs": {"json": SCHEMA}}, [JSON_TEXT], ["{}"]),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, ["{}"], ["x"]),
    ({"structured_outputs": {"regex": "[ab]"}}, ["a"], ["c"]),
    ({"structured_outputs": {"choice": ["yes"]}}, ["yes"], ["no"]),
    ({"structured_outputs": {"grammar": 'start: "x"'}}, ["x"], ["y"]),
]


@pytest.mark.parametrize(("options", "good", "bad"), OPTIONS)
async def test_each_option_sets_the_grammar_of_its_sessions(
    app: App, options: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert (await app.chat(**options)).status_code == 200
    body = {"model": MODEL, "prompt": ["a", "bcd"], **options}
    assert (await app.http.post("/v1/completions", json=body)).status_code == 200
    assert len(app.generated) == 3
    for generate in app.generated:
        assert all(follows(app, generate, text) for text in good)
        assert not any(follows(app, generate, text) for text in bad)


async def test_a_short_grammar_is_built_beside_the_event_loop(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    check = Grammars.check

    def noted(self: Grammars, text: str) -> None:
        threads.append(threading.current_thread())
        check(self, text)

    monkeypatch.setattr(Grammars, "check", noted)
    assert (await app.chat(guided_choice=["yes"])).status_code == 200
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"guided_json": "", "guided_regex": "", "guided_choice": [], "guided_grammar": "", "structured_outputs": {}},
    ],
)
async def test_neutral_values_leave_the_text_free(app: App, options: dict[str, Any]) -> None:
    assert (await app.chat(**options)).status_code == 200
    assert app.generated[0].sampling.grammar is None
    assert not features_of(app.generated[0].fingerprint)


@pytest.mark.parametrize(
    ("options", "param", "place"),
    [
        ({"guided_json": {"properties": {"a": {"type": "strin"}}}}, "guided_json", "properties.a: Invalid type: strin"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"items": {"pattern": "["}}}}},
            "response_format.json_schema.schema",
            "items: regex parse error",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"strict": True, "schema": {"type": "array", "uniqueItems": True}},
                }
            },
            "response_format.json_schema.schema",
            "uniqueItems",
        ),
        ({"guided_regex": "a(?=b)"}, "guided_regex", "look-around"),
        ({"guided_grammar": 'start: "a" b'}, "guided_grammar", "unknown name"),
        ({"structured_outputs": {"grammar": "???"}}, "structured_outputs.grammar", "line 1"),
    ],
)
async def test_a_grammar_that_cannot_be_built_is_refused_with_its_place(
    app: App, options: dict[str, Any], param: str, place: str
) -> None:
    error = error_of(await app.chat(**options), 400)
    assert (error["param"], error["code"]) == (param, "invalid_grammar")
    assert place in error["message"]
    assert app.generated == []


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " *"}}, "structured_outputs.whitespace_pattern"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    for kind, body in ((ChatRequest, HELLO), (CompletionRequest, {"model": MODEL, "prompt": "x"})):
        with pytest.raises(ApiError) as caught:
            parse(kind, json.dumps(body | options).encode())  # type: ignore[arg-type]
        assert (caught.value.status, caught.value.param) == (400, param)
        assert param in caught.value.message


async def test_conflicting_options_are_refused(app: App) -> None:
    choice = {"guided_choice": ["yes"]}
    assert error_of(await app.chat(**choice, ignore_eos=True), 400)["param"] == "ignore_eos"
    named = {"type": "function", "function": {"name": "get_weather"}}
    for tool_choice in ("auto", "required", named):
        error = error_of(await app.chat(**choice, tools=[WEATHER], tool_choice=tool_choice), 400)
        assert error["param"] == "guided_choice"
    assert app.generated == []
    assert (await app.chat(**choice, tools=[WEATHER], tool_choice="none")).status_code == 200


CALL = '{"name": "get_weather", "arguments": {"city": "Köln"}}'
TIME = {"type": "function", "function": {"name": "get_time"}}


async def test_a_form_has_no_effect_where_calls_must_be_made(app: App) -> None:
    app.script = Script(CALL)
    await app.chat(tools=[WEATHER], tool_choice="required")
    alone = app.generated[-1].sampling.grammar
    answer = await app.chat(response_format={"type": "json_object"}, tools=[WEATHER], tool_choice="required")
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert alone is not None
    assert app.generated[-1].sampling.grammar == alone


async def test_an_answer_beside_tools_has_the_form_or_consists_of_calls(app: App, hermes: App) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    for one, call in ((app, CALL), (hermes, f"<tool_call>\n{CALL}\n</tool_call>")):
        for form, text in ((schema, JSON_TEXT), ({"type": "json_object"}, '{"x": 1}')):
            for script, finish in ((call, "tool_calls"), (text, "stop")):
                one.script = Script(script)
                response = await one.chat(tools=[WEATHER, TIME], response_format=form)
                (choice,) = response.json()["choices"]
                assert choice["finish_reason"] == finish
                assert bool(choice["message"].get("tool_calls")) == (finish == "tool_calls")
                assert choice["message"]["content"] == (None if script == call else text)
            assert all(follows(one, one.generated[-1], answer) for answer in (text, call))
            assert not any(follows(one, one.generated[-1], answer) for answer in ("Köln is nice.", f"{text}{call}"))
    parameters = {"properties": {"at": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"enum": ["Köln"]}}}
    tool = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", **parameters}}}
    await app.chat(tools=[tool], response_format=schema)
    assert follows(app, app.generated[-1], '{"name": "go", "arguments": {"at": "Köln"}}')
    assert not follows(app, app.generated[-1], '{"name": "go", "arguments": {"at": "Bonn"}}')
    root = {
        "v": {"const": 7},
        "next": {"anyOf": [{"$ref": "#"}, {"$ref": "#/properties/none"}]},
        "none": {"type": "null"},
    }
    tool["function"]["parameters"] = {"type": "object", "properties": root, "required": ["v", "next"]}  # type: ignore[index]
    await app.chat(tools=[tool], response_format=schema)
    nested = '{"name": "go", "arguments": {"v": 7, "next": {"v": 7, "next": null}}}'
    assert follows(app, app.generated[-1], nested)
    assert not follows(app, app.generated[-1], '{"name": "go", "arguments": {"v": 7, "next": {"name": "go"}}}')
    wrong = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"type": "strin"}}}}}
    error = error_of(await app.chat(tools=[WEATHER], response_format=wrong), 400)
    assert (error["param"], error["code"]) == ("response_format.json_schema.schema", "invalid_grammar")
    assert "properties.a: Invalid type: strin" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, 1),
        (f"[{CALL}, {CALL}]", 2),
        (CALL[:-4], 1),
        ('{"name": "get_weather", "arguments": {"city": 5}}', 0),
        ('{"name": "get_weather", "arguments": "none"}', 0),
        ('{"name": "get_weather"}', 0),
        ('{"arguments": {"city": "Köln"}, "name": "get_weather"}', 0),
    ],
)
async def test_a_text_of_the_form_is_a_call_only_if_it_fits(app: App, text: str, calls: int, stream: bool) -> None:
    app.script = Script(text, round_len=3)
    options = {"tools": [WEATHER], "response_format": {"type": "json_object"}, "stream": stream}
    answer = await app.chat(**options)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [one["delta"] for chunk in chunks for one in chunk["choices"]]
    parts = parts or [one["message"] for one in answer.json()["choices"]]
    called = [call for part in parts for call in part.get("tool_calls") or [] if call["function"].get("name")]
    assert len(called) == calls
    assert "".join(part.get("content") or "" for part in parts) == ("" if calls else text)


async def test_tools_that_must_be_called_are_called_by_grammar(app: App, hermes: App) -> None:
    for one, call in ((app, CALL), (hermes, f"<tool_call>\n{CALL}\n</tool_call>")):
        one.script = Script(call)
        response = await one.chat(tools=[WEATHER, TIME], tool_choice="required")
        assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
        generate = one.generated[-1]
        assert follows(one, generate, call)
        other = call.replace(CALL, '{"name": "get_time", "arguments": {}}')
        assert follows(one, generate, other)
        assert not follows(one, generate, call.replace("get_weather", "get_wether"))
        assert not follows(one, generate, "Köln is nice.")
    assert follows(app, app.generated[-1], f"[{CALL}, {CALL}]")
    assert follows(hermes, hermes.generated[-1], f"{call}\n{other}")


async def test_a_named_tool_is_the_only_one_that_is_called(app: App) -> None:
    app.script = Script(CALL)
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = await client(app).chat.completions.create(**HELLO, tools=[WEATHER, TIME], tool_choice=named)  # type: ignore[call-overload]
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    generate = app.generated[-1]
    assert follows(app, generate, CALL)
    assert not follows(app, generate, '{"name": "get_time", "arguments": {}}')
    assert not follows(app, generate, f"[{CALL}, {CALL}]")


async def test_one_call_where_several_are_not_wanted(app: App) -> None:
    await app.chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    assert follows(app, app.generated[-1], CALL)
    assert not follows(app, app.generated[-1], f"[{CALL}, {CALL}]")


async def test_parameters_that_cannot_be_enforced_name_their_tool(app: App) -> None:
    function = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}
    tool = {"type": "function", "function": function}
    error = error_of(await app.chat(tools=[tool], tool_choice="required"), 400)
    assert (error["param"], error["code"]) == ("tools", "invalid_grammar")
    assert 'the parameters of f: properties.a: Unimplemented keys: ["not"]' in error["message"]
    lenient = {"type": "function", "function": function | {"strict": False}}
    assert (await app.chat(tools=[lenient], tool_choice="required")).status_code == 200


class Trip(pydantic.BaseModel):
    """An answer as a client's own type."""

    city: str
    days: int


async def test_the_openai_client_parses_answers_into_its_types(app: App) -> None:
    app.script = Script(JSON_TEXT)
    answer = await client(app).chat.completions.parse(**HELLO, response_format=Trip)
    assert answer.choices[0].message.parsed == Trip(city="Bonn", days=3)
    assert follows(app, app.generated[-1], JSON_TEXT)
