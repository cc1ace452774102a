"""Anthropic's Messages API: bodies, events and errors in its shape, and the same text as a chat has.

Most answers are read by Anthropic's own client.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from sys import float_info
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import pytest
from gateway_app import MODEL, THINKING, App, thinking_app
from gateway_peer import Script
from pydantic import BaseModel
from test_gateway_tools import CALL, HERMES_CALL, HERMES_TEMPLATE, ROOM, WEATHER, prompt_of, served

from services.gateway.core.reasoning import TAGS
from shared.messages import REASONING_BUDGET, RULES, LogitRules, ReasoningBudget, features_of

if TYPE_CHECKING:
    import anthropic  # at run time only where it is used: it takes two seconds, in each worker of the tests

BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}
ASKED = BODY | {"max_tokens": 300, "tools": [TOOL]}
BOTH = "Let me look.\n" + "\n".join([HERMES_CALL.partition("\n")[2]] * 2)
"""Text, and two calls."""


def client_of(app: App) -> anthropic.AsyncAnthropic:
    import anthropic

    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app.asgi))
    return anthropic.AsyncAnthropic(api_key="none", base_url="http://127.0.0.1:8000", http_client=http, max_retries=0)


@pytest.fixture
async def hermes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    """A gateway whose template shows tools."""
    monkeypatch.setattr("gateway_app.CONTEXT", ROOM)
    async for one in served(tmp_path, HERMES_TEMPLATE):
        yield one


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        found.append(fields)
    return found


async def test_a_message_is_answered(app: App) -> None:
    answer = (await app.http.post("/v1/messages", json=BODY)).json()
    assert answer["id"].startswith("msg_")
    del answer["id"]
    prompt = app.tokenizer.render_chat(BODY["messages"])
    usage = answer.pop("usage")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": app.script.text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(prompt)
    assert (usage["cache_creation_input_tokens"], usage["output_tokens"]) == (0, len(app.script.text))
    assert app.generated[-1].prompt == prompt


@pytest.mark.parametrize(
    ("options", "text", "reason", "sequence"),
    [
        ({"max_tokens": 3}, "Hel", "max_tokens", None),
        ({"stop_sequences": ["xyz", "there"]}, "Hello ", "stop_sequence", "there"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_has_its_reason(
    app: App,
    options: dict[str, Any],
    text: str,
    reason: str,
    sequence: str | None,
    stream: bool,
) -> None:
    response = await app.http.post("/v1/messages", json=BODY | options | {"stream": stream})
    if stream:
        events = events_of(response)
        found = "".join(one["delta"]["text"] for one in events if one["type"] == "content_block_delta")
        end = events[-2]["delta"]
    else:
        end = response.json()
        found = end["content"][0]["text"]
    assert (found, end["stop_reason"], end["stop_sequence"]) == (text, reason, sequence)


async def test_a_stream_has_the_events_in_order(app: App) -> None:
    events = events_of(await app.http.post("/v1/messages", json=BODY | {"stream": True}))
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 1
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["output_tokens"] == 0
    assert events[-2]["usage"] == {"output_tokens": len(app.script.text)}


async def test_an_empty_answer_has_an_empty_block(app: App) -> None:
    app.script = Script("")
    assert (await app.http.post("/v1/messages", json=BODY)).json()["content"] == [{"type": "text", "text": ""}]
    kinds = [one["type"] for one in events_of(await app.http.post("/v1/messages", json=BODY | {"stream": True}))]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_a_thinking_block(tmp_path: Path, stream: bool) -> None:
    thinker = await thinking_app(tmp_path)
    thinker.script = Script("<think>why</think>so", round_len=3)
    response = await thinker.http.post("/v1/messages", json=BODY | {"stream": stream})
    if not stream:
        assert response.json()["content"] == [
            {"type": "thinking", "thinking": "why", "signature": ""},
            {"type": "text", "text": "so"},
        ]
        return
    events = events_of(response)
    starts = [one["content_block"]["type"] for one in events if one["type"] == "content_block_start"]
    assert starts == ["thinking", "text"]
    for index, (kind, text) in enumerate((("thinking", "why"), ("text", "so"))):
        parts = [one["delta"] for one in events if one["type"] == "content_block_delta" and one["index"] == index]
        assert "".join(part[kind] for part in parts) == text
        assert {part["type"] for part in parts} == {f"{kind}_delta"}


async def test_an_answer_continues_the_assistants_last_message(app: App) -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "Well,"}]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    await app.http.post("/v1/messages", json=BODY | {"messages": messages, "system": system})
    prompt = app.tokenizer.decode(app.generated[-1].prompt)
    assert "Be brief." in prompt
    assert prompt.endswith("Well,")


async def test_tokens_are_counted(app: App) -> None:
    body = {name: BODY[name] for name in ("model", "messages")}
    answer = await app.http.post("/v1/messages/count_tokens", json=body)
    assert answer.json() == {"input_tokens": len(app.tokenizer.render_chat(BODY["messages"]))}
    assert app.generated == []


@pytest.mark.parametrize(
    ("body", "status", "kind", "text"),
    [
        ({"model": MODEL, "messages": BODY["messages"]}, 400, "invalid_request_error", "max_tokens is missing"),
        (BODY | {"model": "other"}, 404, "not_found_error", "does not exist"),
        (BODY | {"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking is not supported"),
        (BODY | {"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        (BODY | {"messages": []}, 400, "invalid_request_error", "messages"),
        (BODY | {"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "role"),
        (
            BODY | {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages[0].content[0].type",
        ),
    ],
)
async def test_errors_have_anthropics_body(app: App, body: Any, status: int, kind: str, text: str) -> None:
    response = await app.http.post("/v1/messages", json=body)
    assert response.status_code == status
    found = response.json()
    assert found.keys() == {"type", "error"}
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert text in found["error"]["message"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"top_a": 0.5}, "top_a"),
        ({"n_predict": 5}, "n_predict"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["x"]}, "stop"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]},
            "messages[0].content[0].input",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": 5}]}]},
            "messages[0].content[0].content",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
                ]
            },
            "messages",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_a_wrong_option_is_named(app: App, path: str, options: dict[str, Any], param: str) -> None:
    response = await app.http.post(path, json=BODY | options)
    if path.endswith("count_tokens") and "max_tokens" in options:
        assert response.status_code == 200, "it has no effect on the number of tokens"
        return
    assert response.status_code == 400, response.text
    message: str = response.json()["error"]["message"]
    assert message.partition(" ")[0].rstrip(":") == param


async def test_numbers_may_be_written_with_a_fraction_of_zero(app: App) -> None:
    answer = await app.http.post("/v1/messages", json=BODY | {"max_tokens": 3.0, "top_k": 5.0})
    assert answer.json()["content"][0]["text"] == "Hel"
    assert app.generated[-1].sampling.top_k == 5


@pytest.mark.parametrize("round_len", [1, 3, 100])
async def test_the_official_client_calls_tools(hermes: App, round_len: int) -> None:
    hermes.script = Script(BOTH, round_len=round_len)
    client = client_of(hermes)
    whole = await client.messages.create(**ASKED)
    assert whole.stop_reason == "tool_use"
    text, *calls = whole.content
    assert text.type == "text"
    assert text.text == "Let me look."
    assert [(call.type, call.name, call.input) for call in calls if call.type == "tool_use"] == [
        ("tool_use", "get_weather", {"city": "Köln"})
    ] * 2
    assert len({call.id for call in calls if call.type == "tool_use"}) == 2
    async with client.messages.stream(**ASKED) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_message()
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert "input_json" in kinds
    assert streamed.stop_reason == "tool_use"
    assert [block.model_dump(exclude={"id"}) for block in streamed.content] == [
        block.model_dump(exclude={"id"}) for block in whole.content
    ]
    assert streamed.usage.output_tokens == whole.usage.output_tokens


async def test_arguments_are_streamed_while_they_are_made(hermes: App) -> None:
    hermes.script = Script(HERMES_CALL, round_len=2)
    events = events_of(await hermes.http.post("/v1/messages", json=ASKED | {"stream": True}))
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta" and one["index"] == 1]
    assert len(deltas) > 4
    assert {delta["type"] for delta in deltas} == {"input_json_delta"}
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"city": "Köln"}
    begun = next(one["content_block"] for one in events if one["type"] == "content_block_start" and one["index"] == 1)
    assert (begun["type"], begun["name"], begun["input"]) == ("tool_use", "get_weather", {})


async def test_a_call_with_a_number_beyond_floats_has_the_largest_one(hermes: App) -> None:
    arguments = '{"city": "Bonn", "days": [1e999, -1e400, 2.5]}'
    hermes.script = Script(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>', round_len=9
    )
    (call,) = (await client_of(hermes).messages.create(**ASKED)).content
    assert call.type == "tool_use"
    assert call.input == {"city": "Bonn", "days": [float_info.max, -float_info.max, 2.5]}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_was_cut_off_has_its_beginning(app: App, stream: bool) -> None:
    app.script = Script('{"name": "get_weather", "arguments": {"city": "Bonn", "days": 3}}', round_len=3)
    body = ASKED | {"max_tokens": 55}
    if stream:
        async with client_of(app).messages.stream(**body) as events:
            answer = await events.get_final_message()
    else:
        answer = await client_of(app).messages.create(**body)
    (call,) = answer.content
    assert call.type == "tool_use"
    assert (answer.stop_reason, call.input) == ("max_tokens", {"city": "Bonn"})


async def test_the_history_of_calls_is_the_chats(hermes: App) -> None:
    call, result = {"city": "Köln"}, [{"type": "text", "text": "rain"}]
    blocks = [
        [{"type": "text", "text": "Weather?"}],
        [
            {"type": "thinking", "thinking": "hidden", "signature": "x"},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": call},
            {"type": "tool_use", "id": "call_2", "name": "get_weather", "input": call},
        ],
        [
            {"type": "tool_result", "tool_use_id": "call_1", "content": result},
            {"type": "tool_result", "tool_use_id": "call_2", "content": "gone", "is_error": True},
            {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
        ],
    ]
    messages = [{"role": role, "content": one} for role, one in zip(["user", "assistant", "user"], blocks, strict=True)]
    system = [{"type": "text", "text": "Be brief."}]
    await client_of(hermes).messages.create(**ASKED | {"messages": messages}, system=system)  # type: ignore[call-overload]
    prompt = hermes.generated[-1].prompt
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(call)}}
        for number in (1, 2)
    ]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Error: gone"},
        {"role": "user", "content": "And?"},
    ]
    assert (await hermes.chat(messages=chat, tools=[WEATHER])).status_code == 200
    # A text of one part may be a list or a string, and the template shows them alike only where it looks.
    flat = hermes.tokenizer.decode(prompt).replace("[{'type': 'text', 'text': '", "").replace("'}]", "")
    assert flat == prompt_of(hermes)
    counted = await client_of(hermes).messages.count_tokens(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        system=system,  # type: ignore[arg-type]
        tools=[TOOL],  # type: ignore[list-item]
    )
    assert counted.input_tokens == len(prompt)


@pytest.mark.parametrize(
    ("choice", "calls", "required"),
    [
        ({"type": "auto"}, 2, False),
        ({"type": "auto", "disable_parallel_tool_use": True}, 1, False),
        ({"type": "any"}, 2, True),
        ({"type": "tool", "name": "get_weather"}, 2, True),
        ({"type": "none"}, 0, False),
    ],
)
async def test_the_choice_of_tools_is_the_chats(
    hermes: App, choice: dict[str, Any], calls: int, required: bool
) -> None:
    hermes.script = Script(BOTH)
    answer = (await hermes.http.post("/v1/messages", json=ASKED | {"tool_choice": choice})).json()
    assert [block["type"] for block in answer["content"]].count("tool_use") == calls
    assert ("get_weather" in prompt_of(hermes)) == (choice["type"] != "none")
    assert (hermes.generated[-1].sampling.grammar is not None) == required
    if choice["type"] == "none":
        assert answer["content"] == [{"type": "text", "text": BOTH}]
        assert answer["stop_reason"] == "end_turn"


async def test_required_calls_follow_a_grammar_of_the_tools(hermes: App) -> None:
    chat_choices = {
        "any": "required",
        "tool": {"type": "function", "function": {"name": "get_weather"}},
    }
    for kind, chat_choice in chat_choices.items():
        choice = {"type": kind, "disable_parallel_tool_use": True} | ({"name": "get_weather"} if kind == "tool" else {})
        await hermes.http.post("/v1/messages", json=ASKED | {"tool_choice": choice})
        asked = hermes.generated[-1].sampling.grammar
        await hermes.chat(tools=[WEATHER], tool_choice=chat_choice, parallel_tool_calls=False)
        assert asked is not None
        assert hermes.generated[-1].sampling.grammar == asked


async def test_a_tool_that_was_not_offered_is_an_ordinary_answer(app: App) -> None:
    app.script = Script(CALL.replace("get_weather", "other"))
    answer = (await app.http.post("/v1/messages", json=ASKED)).json()
    assert [block["type"] for block in answer["content"]] == ["text"]


@pytest.mark.parametrize(
    ("thinking", "text", "prompt"),
    [
        ({"type": "enabled", "budget_tokens": 1024.0}, "<think>why</think>so", "assistant\n"),
        ({"type": "adaptive"}, "<think>why</think>so", "assistant\n"),
        ({"type": "disabled"}, "so", "<think></think>"),
    ],
)
async def test_thinking_is_switched_in_the_template(tmp_path: Path, thinking: Any, text: str, prompt: str) -> None:
    thinker = await thinking_app(tmp_path)
    thinker.script = Script(text)
    answer = await client_of(thinker).messages.create(**BODY, thinking=thinking)
    assert [block.type for block in answer.content] == (["thinking", "text"] if "why" in text else ["text"])
    assert thinker.tokenizer.decode(thinker.generated[-1].prompt).endswith(prompt)


async def test_the_budget_of_thinking_is_a_rule_of_the_session(tmp_path: Path) -> None:
    thinker = await thinking_app(tmp_path)
    thinker.script = Script("<think>why</think>so")
    await client_of(thinker).messages.create(**BODY, thinking={"type": "enabled", "budget_tokens": 1024})
    made, tokenizer = thinker.generated[-1], thinker.tokenizer
    opening, closing = (tokenizer.added_token(tag) for tag in TAGS)
    assert closing is not None
    budget = ReasoningBudget(most=1024, opening=opening, blank=tokenizer.blank_ids, closing=closing)
    assert made.sampling.rules == LogitRules(prompt_len=len(made.prompt), reasoning=budget)
    assert features_of(made.fingerprint) == {RULES, REASONING_BUDGET}
    await client_of(thinker).messages.create(**BODY, thinking={"type": "adaptive"})
    assert thinker.generated[-1].sampling.rules is None


async def test_thinking_that_cannot_be_switched_is_refused(app: App, tmp_path: Path) -> None:
    always = await thinking_app(tmp_path, THINKING.replace("enable_thinking", "message"))
    always.script = Script("<think>why</think>so")
    for one, kind, status in (
        (always, "enabled", 200),
        (always, "disabled", 400),
        (app, "enabled", 400),
        (app, "disabled", 200),
    ):
        response = await one.http.post("/v1/messages", json=BODY | {"thinking": {"type": kind}})
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["error"]["message"].startswith("thinking")


class City(BaseModel):
    name: str


async def test_the_official_client_parses_structured_output(app: App) -> None:
    app.script = Script('{"name": "Bonn"}')
    answer = await client_of(app).messages.parse(**BODY, output_format=City)
    assert answer.parsed_output == City(name="Bonn")
    grammar = app.generated[-1].sampling.grammar
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    await app.chat(guided_json=schema | {"additionalProperties": False})
    assert grammar is not None
    assert app.generated[-1].sampling.grammar is not None
    for each in (grammar.text, app.generated[-1].sampling.grammar.text):
        assert '"name"' in each


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"format": {"type": "xml"}}, "output_config.format.type"),
        ({"format": {"type": "json_schema"}}, "output_config.format.schema"),
        ({"format": {"type": "json_schema", "schema": {"not": {}}}}, "output_config.format.schema"),
        ({"effort": "low"}, "reasoning_effort"),
        ({"effort": "none"}, "output_config.effort"),
    ],
)
async def test_a_wrong_form_is_named(app: App, config: dict[str, Any], param: str) -> None:
    response = await app.http.post("/v1/messages", json=BODY | {"output_config": config})
    assert response.status_code == 400
    assert response.json()["error"]["message"].partition(" ")[0].rstrip(":") == param


async def test_the_official_client_knows_the_errors(app: App) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError):
        await client_of(app).messages.create(**BODY | {"model": "other"})
    with pytest.raises(anthropic.BadRequestError, match="typical_p is not supported here"):
        await client_of(app).messages.create(**BODY, extra_body={"typical_p": 0.5})


async def test_an_error_in_a_stream_is_an_event(app: App) -> None:
    app.script = Script("Hello there", failure_after=2)
    events = events_of(await app.http.post("/v1/messages", json=BODY | {"stream": True}))
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"


async def test_the_key_may_be_in_anthropics_header(guarded: tuple[App, str]) -> None:
    app, key = guarded
    refused = await app.http.post("/v1/messages", json=BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert (await app.http.post("/v1/messages", json=BODY, headers={"x-api-key": key})).status_code == 200
