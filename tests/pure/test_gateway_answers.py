"""What an answer carries beside its text: log-probabilities, arithmetic, reasoning, usage and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_app import HELLO, MODEL, App, chunks_of, error_of, thinking_app
from gateway_peer import Script

from services.gateway.core.reasoning import TAGS
from shared.messages import ReasoningBudget
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer


@pytest.mark.parametrize("silent", [False, True])
async def test_an_answer_of_mixed_arithmetic_reports_it(folder: ModelFolder, silent: bool) -> None:
    app = App(folder, idle_check_s=0.1)
    app.silent = silent
    app.script = Script(arithmetics=("wisp-1", "other"))
    watching = asyncio.create_task(app.sessions.watch())
    assert (await app.chat()).json()["wisp"] == {"arithmetic": ["wisp-1", "other"]}
    *before, last = chunks_of(await app.chat(stream=True))
    assert last["wisp"] == {"arithmetic": ["wisp-1", "other"]}
    assert not any("wisp" in chunk for chunk in before)
    watching.cancel()


async def test_an_answer_of_one_arithmetic_names_it_only_in_a_trace(app: App) -> None:
    app.script = Script(arithmetics=("wisp-1",))
    assert "wisp" not in (await app.chat()).json()
    assert not any("wisp" in chunk for chunk in chunks_of(await app.chat(stream=True)))
    assert (await app.chat(wisp={"trace": True})).json()["wisp"]["arithmetic"] == ["wisp-1"]
    assert chunks_of(await app.chat(stream=True, wisp={"trace": True}))[-1]["wisp"]["arithmetic"] == ["wisp-1"]


async def test_the_tokens_of_a_chat_have_log_probabilities(app: App) -> None:
    app.script = Script("Hello", round_len=2)
    client = openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=app.http)
    messages: Any = HELLO["messages"]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    start = len(app.generated[-1].prompt)
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [one.token for one in content] == list("Hello")
    assert [one.logprob for one in content] == [-(start + i) / 8 for i in range(5)]
    assert all(len(one.top_logprobs) == 2 for one in content)
    streamed = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, stream=True)
    parts = [chunk.choices[0] async for chunk in streamed if chunk.choices]
    assert [one.token for part in parts if part.logprobs for one in part.logprobs.content or []] == list("Hello")
    assert "".join(part.delta.content or "" for part in parts) == "Hello"


@pytest.mark.parametrize("silent", [False, True])
async def test_an_echo_has_those_of_the_prompt(folder: ModelFolder, silent: bool) -> None:
    """lm-eval's requests. Records of lost results come from Redis, as their tokens do."""
    app = App(folder, idle_check_s=0.05)
    app.silent = silent
    app.script = Script("yes", ends=False)
    watching = asyncio.create_task(app.sessions.watch())
    body = {"model": MODEL, "prompt": "abc", "echo": True, "logprobs": 1}
    for max_tokens, text in ((0, "abc"), (1, "abcy")):
        answer = await app.http.post("/v1/completions", json=body | {"max_tokens": max_tokens})
        (choice,) = answer.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list(text)
        assert logprobs["token_logprobs"] == [None, *(-at / 8 for at in range(1, len(text)))]
        assert logprobs["text_offset"] == list(range(len(text)))
        assert logprobs["top_logprobs"][0] is None
        assert answer.json()["usage"]["completion_tokens"] == max_tokens
    watching.cancel()


async def test_an_echo_in_a_stream_has_them_with_its_text(app: App) -> None:
    app.script = Script("yes", round_len=1)
    body = {"model": MODEL, "prompt": "abc", "echo": True, "logprobs": 0, "stream": True}
    lines = (await app.http.post("/v1/completions", json=body)).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    tokens, offsets = [], []
    for chunk in chunks:
        if (logprobs := chunk["choices"][0]["logprobs"]) is not None:
            tokens += logprobs["tokens"]
            offsets += logprobs["text_offset"]
    assert (tokens, offsets) == (list("abcyes"), list(range(6)))


async def test_prompt_logprobs_are_those_of_vllm(app: App) -> None:
    app.script = Script("y")
    body = {"model": MODEL, "prompt": "abc", "prompt_logprobs": 1}
    (choice,) = (await app.http.post("/v1/completions", json=body)).json()["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [[one["decoded_token"] for one in position.values()] for position in others] == [["b"], ["c"]]
    answer = (await app.chat(prompt_logprobs=0)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_a_resumed_stream_has_the_log_probabilities_of_its_rest(app: App) -> None:
    app.script = Script("Hello", round_len=1)
    body = HELLO | {"logprobs": True, "stream": True, "wisp": {"resumable": True}}
    first = (await app.http.post("/v1/chat/completions", json=body)).text
    events = [event for event in first.split("\n\n") if event.startswith("id: ")]
    last_id = events[2].splitlines()[0].removeprefix("id: ")
    rest = await app.http.get(f"/v1/streams/{last_id.split('/')[0]}", headers={"last-event-id": last_id})
    for text in (first, rest.text):
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        shown = "".join(choice["delta"].get("content", "") for choice in choices)
        contents = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        assert "".join(one["token"] for content in contents for one in content) == shown
    assert shown == "llo"


@pytest.mark.parametrize("tags", ["text", "tokens", "control tokens"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "text", "reasoning", "content"),
    [
        ({}, "<think>why</think>so", "why", "so"),
        ({"reasoning_effort": "low"}, "why</think>so", "why", "so"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "so</think>", "", "so</think>"),
        ({}, "<think>why", "why", ""),
    ],
)
async def test_reasoning_is_apart_from_the_content(
    tmp_path: Path, tags: str, stream: bool, options: dict[str, Any], text: str, reasoning: str, content: str
) -> None:
    thinker = await thinking_app(tmp_path, tags=tags)
    thinker.script = Script(text, round_len=2)
    answer = await thinker.chat(stream=stream, stream_options={"include_usage": True}, **options)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    usage = (chunks[-1] if stream else answer.json())["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(reasoning)}
    if not stream:
        message = answer.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (reasoning or None, content)
        return
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasoning
    assert "".join(delta.get("content", "") for delta in deltas) == content


@pytest.mark.parametrize("tags", ["tokens", "control tokens"])
async def test_a_budget_of_reasoning_begins_where_the_reasoning_does(tmp_path: Path, tags: str) -> None:
    thinker = await thinking_app(tmp_path, tags=tags)
    (opening,), (closing,) = (thinker.tokenizer.encode_part(tag) for tag in TAGS)
    blank = [token for space in "\n\r\t \v\f\x1c\x1d\x1e\x1f" for token in thinker.tokenizer.encode_plain(space)]
    begins = ReasoningBudget(most=7, opening=opening, blank=sorted(blank), closing=closing)
    opened = ReasoningBudget(most=7, opening=None, closing=closing)
    for options, budget in (({}, begins), ({"reasoning_effort": "low"}, opened)):
        assert (await thinker.chat(thinking_token_budget=7, **options)).status_code == 200
        rules = thinker.generated[-1].sampling.rules
        assert rules is not None
        assert rules.reasoning == budget


async def test_the_vocabulary_is_read_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinker, readers = await thinking_app(tmp_path, tags="tokens"), list[threading.Thread]()

    def found(self: Tokenizer) -> list[int]:
        readers.append(threading.current_thread())
        return []

    blank_ids = cached_property(found)
    blank_ids.__set_name__(Tokenizer, "blank_ids")
    monkeypatch.setattr(Tokenizer, "blank_ids", blank_ids)
    assert (await thinker.chat(thinking_token_budget=7)).status_code == 200
    (reader,) = readers
    assert reader is not threading.main_thread()


async def test_a_budget_is_refused_where_tags_are_no_tokens(app: App, tmp_path: Path) -> None:
    for one, reason in ((app, "marks no reasoning"), (await thinking_app(tmp_path, tags="text"), "no tokens")):
        error = error_of(await one.chat(thinking_token_budget=7), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", "thinking_token_budget")
        assert reason in error["message"]


async def test_metrics_of_speculation_come_where_asked_for(app: App) -> None:
    assert "metrics" not in (await app.chat()).json()
    metrics = (await app.chat(wisp={"metrics": True})).json()["metrics"]["speculative_decoding"]
    assert metrics["num_accepted_draft_tokens"] == sum(i * n for i, n in enumerate(metrics["acceptance_histogram"]))
    assert metrics["num_spec_steps"] == sum(metrics["acceptance_histogram"]) > 0
    assert (await app.chat(wisp={"metrics": True}, n=2)).json()["metrics"] is None
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = (await app.chat(wisp={"metrics": True}, stream=True, **options)).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert [chunk["metrics"]["speculative_decoding"] for chunk in chunks if "metrics" in chunk] == [metrics]


async def test_usage_counts_predicted_tokens(app: App) -> None:
    app.script = Script("Hello there")
    prediction = {"type": "content", "content": "Hello where"}
    usage = (await app.chat(prediction=prediction)).json()["usage"]
    assert usage["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 10,
        "rejected_prediction_tokens": 1,
    }
    assert app.generated[-1].prediction == app.tokenizer.encode("Hello where")
    assert (await app.chat()).json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
