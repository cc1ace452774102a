"""OpenAI's Responses API: items, events and stored conversations, read by OpenAI's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgpack
import openai
import pytest
from gateway_app import MODEL, THINKING, App, error_of
from gateway_peer import Script, tiny_target
from pydantic import BaseModel
from test_gateway_tools import HERMES_TEMPLATE, served

from shared.errors import BrokersError
from shared.models.folder import ModelFolder

BODY: dict[str, Any] = {"model": MODEL, "input": "Hi"}
TOOL: dict[str, Any] = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
CALL = '{"name": "add", "arguments": {"a": 1}}'


def client_of(app: App) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=app.http, max_retries=0)


async def post(app: App, **options: Any) -> httpx.Response:
    return await app.http.post("/v1/responses", json=BODY | options)


async def test_the_official_client_reads_an_answer(app: App) -> None:
    answer = await client_of(app).responses.create(
        model=MODEL, input="Hi", instructions="Be brief.", metadata={"a": "b"}
    )
    assert answer.output_text == app.script.text
    assert (answer.status, answer.object, answer.metadata) == ("completed", "response", {"a": "b"})
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(app.script.text)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert app.generated[-1].prompt == app.tokenizer.render_chat(messages)


async def test_the_official_client_reads_a_stream(app: App) -> None:
    stream = await client_of(app).responses.create(model=MODEL, input="Hi", stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == app.script.text
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == app.script.text
    whole = await client_of(app).responses.create(model=MODEL, input="Hi")
    assert [item.type for item in last.response.output] == [item.type for item in whole.output]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cut_answer_is_incomplete(app: App, stream: bool) -> None:
    response = await post(app, max_output_tokens=3, stream=stream)
    body = last_event(response)["response"] if stream else response.json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["content"][0]["text"] == "Hel"


def last_event(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(response.text.strip().split("\n\n")[-1].split("\ndata: ")[1])
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_goes_on_from_a_stored_response(app: App, stream: bool) -> None:
    first = await post(app, stream=stream, instructions="Be brief.")
    first_id = (last_event(first)["response"] if stream else first.json())["id"]
    await post(app, input="And?", previous_response_id=first_id)
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": app.script.text},
        {"role": "user", "content": "And?"},
    ]
    assert app.generated[-1].prompt == app.tokenizer.render_chat(conversation), "instructions are not carried over"


async def test_only_stored_responses_go_on(app: App) -> None:
    first = (await post(app, store=False)).json()
    for unknown in (first["id"], "resp_none", "x" * 5000):
        error = error_of(await post(app, previous_response_id=unknown), 404)
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


async def test_another_keys_response_is_not_found(guarded: tuple[App, str]) -> None:
    app, key = guarded
    headers = {"authorization": f"Bearer {key}"}
    first = (await app.http.post("/v1/responses", json=BODY, headers=headers)).json()
    body = BODY | {"previous_response_id": first["id"]}
    assert (await app.http.post("/v1/responses", json=body, headers=headers)).status_code == 200
    record = msgpack.unpackb(app.services.store.responses[first["id"]])
    app.services.store.responses["resp_other"] = msgpack.packb(record | {"holder": "0123456789ab"})
    other = BODY | {"previous_response_id": "resp_other"}
    error = error_of(await app.http.post("/v1/responses", json=other, headers=headers), 404)
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_are_called_and_answered(app: App, stream: bool) -> None:
    app.script = Script(CALL, round_len=3)
    response = await post(app, tools=[TOOL], stream=stream)
    body = last_event(response)["response"] if stream else response.json()
    (call,) = body["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "add", {"a": 1})
    if stream:
        events = [json.loads(one.split("\ndata: ")[1]) for one in response.text.strip().split("\n\n")]
        deltas = [one["delta"] for one in events if one["type"] == "response.function_call_arguments.delta"]
        assert "".join(deltas) == call["arguments"]
    app.script = Script("2")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    by_id = await post(app, previous_response_id=body["id"], input=[result], tools=[TOOL])
    prompt = app.generated[-1].prompt
    history = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, call, result]
    in_full = await post(app, input=history, tools=[TOOL])
    assert app.generated[-1].prompt == prompt
    assert by_id.json()["output"][0]["content"] == in_full.json()["output"][0]["content"]


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_an_item(tmp_path: Path, stream: bool) -> None:
    made = tiny_target(tmp_path / MODEL)
    (made.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": THINKING}))
    thinker = App(ModelFolder(made.path))
    thinker.script = Script("why</think>so", round_len=3)
    response = await post(thinker, reasoning={"effort": "low"}, stream=stream)
    body = last_event(response)["response"] if stream else response.json()
    assert [(item["type"], item["content"][0]["text"]) for item in body["output"]] == [
        ("reasoning", "why"),
        ("message", "so"),
    ]
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "text.format.schema"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"max_output_tokens": 5.5}, "max_output_tokens"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        *[
            ({"input": [{"role": "user", "content": content}]}, "input[0].content[0].type")
            for content in (["text"], ["input_text"], [5], [{"type": ["text"], "text": "x"}])
        ],
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type"),
        *[
            (
                {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}]},
                "input[0].arguments",
            )
            for arguments in ({"a": 10**30}, None)
        ],
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"input": 5}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ],
)
async def test_what_is_not_supported_is_refused(app: App, options: dict[str, Any], param: str) -> None:
    assert error_of(await post(app, **options), 400)["param"] == param


async def test_each_item_of_an_answer_has_an_id_of_its_own(tmp_path: Path) -> None:
    async for hermes in served(tmp_path, HERMES_TEMPLATE):
        hermes.script = Script(f"Let me see. <tool_call>\n{CALL}\n</tool_call> Now I know.")
        response = await post(hermes, tools=[TOOL], stream=True)
        output = last_event(response)["response"]["output"]
        assert [item["type"] for item in output] == ["message", "function_call", "message"]
        assert len({item["id"] for item in output}) == 3
        for item in (output[0], output[2]):
            await post(
                hermes, input=[{"type": "item_reference", "id": item["id"]}, {"role": "user", "content": "And?"}]
            )
            said = {"role": "assistant", "content": item["content"][0]["text"]}
            asked = [said, {"role": "user", "content": "And?"}]
            assert hermes.generated[-1].prompt == hermes.tokenizer.render_chat(asked)


@pytest.mark.parametrize("stream", [False, True])
async def test_items_are_named_by_reference(app: App, stream: bool) -> None:
    app.script = Script(CALL, round_len=3)
    response = await post(app, tools=[TOOL], stream=stream)
    (call,) = (last_event(response)["response"] if stream else response.json())["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    question = {"role": "user", "content": "Hi"}
    app.script = Script("2")
    for item in (call, {"type": "item_reference", "id": call["id"]}):
        assert (await post(app, input=[question, item, result], tools=[TOOL])).status_code == 200
    assert app.generated[-1].prompt == app.generated[-2].prompt


async def test_only_stored_items_are_named_by_reference(guarded: tuple[App, str]) -> None:
    app, key = guarded
    headers = {"authorization": f"Bearer {key}"}
    kept, left = [
        (await app.http.post("/v1/responses", json=BODY | {"store": store}, headers=headers)).json()
        for store in (True, False)
    ]
    record = msgpack.unpackb(app.services.store.responses[kept["id"]])
    app.services.store.responses["resp_0123"] = msgpack.packb(record | {"holder": "0123456789ab"})
    of_before = {name: value for name, value in record.items() if name != "output"}
    app.services.store.responses["resp_4567"] = msgpack.packb(of_before)

    async def named(item_id: Any) -> httpx.Response:
        body = BODY | {"input": [{"type": "item_reference", "id": item_id}, {"role": "user", "content": "And?"}]}
        return await app.http.post("/v1/responses", json=body, headers=headers)

    assert (await named(kept["output"][0]["id"])).status_code == 200
    for unknown in (left["output"][0]["id"], "msg_0123", "msg_4567", f"{kept['output'][0]['id']}_7", "x" * 5000, None):
        error = error_of(await named(unknown), 404)
        assert (error["code"], error["param"]) == ("item_not_found", "input[0].id")


class City(BaseModel):
    name: str


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_client_parses_structured_output(app: App, stream: bool) -> None:
    app.script = Script('{"name": "Bonn"}')
    client = client_of(app)
    if stream:
        async with client.responses.stream(model=MODEL, input="Hi", text_format=City) as events:
            async for _ in events:
                pass
            answer = await events.get_final_response()
    else:
        answer = await client.responses.parse(model=MODEL, input="Hi", text_format=City)
    assert answer.output_parsed == City(name="Bonn")
    shown = answer.model_dump(by_alias=True)["text"]["format"]
    assert (shown["type"], shown["name"], shown["strict"]) == ("json_schema", "City", True)
    grammar = app.generated[-1].sampling.grammar
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "City", "schema": shown["schema"], "strict": True},
    }
    await app.chat(response_format=response_format)
    assert grammar is not None
    assert app.generated[-1].sampling.grammar is not None
    assert app.generated[-1].sampling.grammar.text == grammar.text


@pytest.mark.parametrize(("kind", "has_grammar"), [("text", False), ("json_object", True)])
async def test_formats_without_a_schema(app: App, kind: str, has_grammar: bool) -> None:
    answer = await post(app, text={"format": {"type": kind}})
    assert answer.json()["text"] == {"format": {"type": kind}}
    assert (app.generated[-1].sampling.grammar is not None) == has_grammar


async def test_numbers_may_be_written_with_a_fraction_of_zero(app: App) -> None:
    answer = (await post(app, max_output_tokens=3.0, seed=7.0)).json()
    assert answer["output"][0]["content"][0]["text"] == "Hel"
    assert app.generated[-1].sampling.seed == 7


async def test_a_named_tool_is_called_by_a_grammar(app: App) -> None:
    app.script = Script(CALL)
    answer = await client_of(app).responses.create(
        model=MODEL,
        input="Hi",
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice={"type": "function", "name": "add"},
    )
    assert [item.type for item in answer.output] == ["function_call"]
    assert app.generated[-1].sampling.grammar is not None
    refused = await post(app, tools=[TOOL], tool_choice={"type": "function", "name": "other"})
    assert error_of(refused, 400)["param"] == "tool_choice"


async def test_an_answer_that_cannot_be_stored_fails(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(response_id: str, body: bytes) -> None:
        raise BrokersError("Redis is away")

    monkeypatch.setattr(app.transport, "store_response", away)
    assert error_of(await post(app), 503)["code"] == "redis_unavailable"
    assert (await post(app, store=False)).status_code == 200
    streamed = await post(app, stream=True)
    assert "response.completed" not in streamed.text
    assert error_of(streamed, 503)["code"] == "redis_unavailable"
