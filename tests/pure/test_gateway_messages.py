"""Anthropic's Messages API: bodies, events and errors in its shape, and the same text as a chat has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_peer import Script, tiny_target
from test_gateway_app import MODEL, THINKING, App, app, folder, guarded  # noqa: F401 fixtures

from shared.models.folder import ModelFolder

BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        found.append(fields)
    return found


async def test_a_message_is_answered(app: App) -> None:  # noqa: F811
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
    app: App,  # noqa: F811
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


async def test_a_stream_has_the_events_in_order(app: App) -> None:  # noqa: F811
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


async def test_an_empty_answer_has_an_empty_block(app: App) -> None:  # noqa: F811
    app.script = Script("")
    assert (await app.http.post("/v1/messages", json=BODY)).json()["content"] == [{"type": "text", "text": ""}]
    kinds = [one["type"] for one in events_of(await app.http.post("/v1/messages", json=BODY | {"stream": True}))]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_a_thinking_block(tmp_path: Path, stream: bool) -> None:
    made = tiny_target(tmp_path / MODEL)
    (made.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": THINKING}))
    thinker = App(ModelFolder(made.path))
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


async def test_an_answer_continues_the_assistants_last_message(app: App) -> None:  # noqa: F811
    messages = [*BODY["messages"], {"role": "assistant", "content": "Well,"}]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    await app.http.post("/v1/messages", json=BODY | {"messages": messages, "system": system})
    prompt = app.tokenizer.decode(app.generated[-1].prompt)
    assert "Be brief." in prompt
    assert prompt.endswith("Well,")


async def test_tokens_are_counted(app: App) -> None:  # noqa: F811
    body = {name: BODY[name] for name in ("model", "messages")}
    answer = await app.http.post("/v1/messages/count_tokens", json=body)
    assert answer.json() == {"input_tokens": len(app.tokenizer.render_chat(BODY["messages"]))}
    assert app.generated == []


@pytest.mark.parametrize(
    ("body", "status", "kind", "text"),
    [
        ({"model": MODEL, "messages": BODY["messages"]}, 400, "invalid_request_error", "max_tokens is missing"),
        (BODY | {"model": "other"}, 404, "not_found_error", "does not exist"),
        (BODY | {"tools": [{"name": "f", "input_schema": {}}]}, 400, "invalid_request_error", "tools is not supported"),
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
async def test_errors_have_anthropics_body(app: App, body: Any, status: int, kind: str, text: str) -> None:  # noqa: F811
    response = await app.http.post("/v1/messages", json=body)
    assert response.status_code == status
    found = response.json()
    assert found.keys() == {"type", "error"}
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert text in found["error"]["message"]


async def test_an_error_in_a_stream_is_an_event(app: App) -> None:  # noqa: F811
    app.script = Script("Hello there", failure_after=2)
    events = events_of(await app.http.post("/v1/messages", json=BODY | {"stream": True}))
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"


async def test_the_key_may_be_in_anthropics_header(guarded: tuple[App, str]) -> None:  # noqa: F811
    app, key = guarded  # noqa: F811
    refused = await app.http.post("/v1/messages", json=BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert (await app.http.post("/v1/messages", json=BODY, headers={"x-api-key": key})).status_code == 200
