"""Options on logits give the same text, whoever drafts, whatever shares the batch. test_baseline_serving.py has the
baselines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from asking import Case, Client, Traffic

from services.tools.local.stack import Stack
from shared.engine import Engine, Step
from shared.models.folder import AUTO, ModelFolder


@pytest.mark.parametrize("draft", ["none", "lookup", "hidden", "combined"])
async def test_every_option_beside_many_others(
    client: Client, cases: list[Case], option_cases: list[Case], traffic: Traffic, draft: str
) -> None:
    traffic.clear()
    every = [*option_cases, *cases[:4]]
    answers = await client.ask_all(every, draft)
    assert [(c.options, a) for c, a in zip(every, answers, strict=True) if a != c.tokens] == []
    if draft == "hidden":
        assert sum(result.accepted for result in traffic.results) > 0, "drafts follow the options"


async def test_options_that_leave_no_token_are_a_clear_400(stack: Stack, client: Client) -> None:
    body = {"model": stack.target.name, "prompt": [5, 6], "allowed_token_ids": [9], "min_tokens": 1}
    answer = await client.http.post(f"{stack.url}/completions", json=body | {"stop_token_ids": [9]})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "no_token_allowed"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_log_probabilities_are_the_targets_with_any_draft(
    stack: Stack, client: Client, cases: list[Case], target_folder: Path, temperature: float
) -> None:
    body = {"model": stack.target.name, "prompt": cases[3].prompt, "max_tokens": 12, "echo": True, "logprobs": 2}
    body |= {"temperature": temperature, "seed": 3, "return_tokens_as_token_ids": True}
    found = []
    for draft in ("none", "lookup", "combined"):
        answer = await client.http.post(f"{stack.url}/completions", json=body | {"wisp": {"draft": draft}})
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["choices"][0]["logprobs"])
    assert found[1:] == found[:1] * 2, "to the last bit"
    (first,) = found[:1]
    tokens = [int(name.removeprefix("token_id:")) for name in first["tokens"]]
    assert tokens[: len(cases[3].prompt)] == cases[3].prompt
    engine = Engine(target_folder, dtype=ModelFolder(target_folder).resolved(AUTO), budget_tokens=1024)
    engine.attach("reference", tokens)
    logits = engine.forward([Step("reference", tokens, rows=len(tokens))]).logits
    rows = torch.log_softmax(logits.double(), -1)
    expected = [float(row[token]) for row, token in zip(rows, tokens[1:], strict=False)]
    assert first["token_logprobs"][0] is None
    assert first["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    best = [{f"token_id:{one}" for one in row.topk(2).indices.tolist()} for row in rows[:-1]]
    assert all(two <= top.keys() for two, top in zip(best, first["top_logprobs"][1:], strict=True))


async def test_a_prompts_likelihood_needs_no_output(stack: Stack, client: Client, cases: list[Case]) -> None:
    body = {"model": stack.target.name, "prompt": [cases[0].prompt, cases[4].prompt], "max_tokens": 0}
    answer = await client.http.post(f"{stack.url}/completions", json=body | {"echo": True, "logprobs": 1})
    assert answer.status_code == 200, answer.text
    for choice, case in zip(answer.json()["choices"], (cases[0], cases[4]), strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(case.prompt)
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert answer.json()["usage"]["completion_tokens"] == 0


async def test_a_prediction_saves_rounds_and_changes_no_token(stack: Stack, client: Client) -> None:
    """The model's own text, with a few edits, as the prediction of it."""
    question = [{"role": "user", "content": "Write a short story about a fox and a crow."}]
    body = {"model": stack.target.name, "messages": question, "temperature": 0, "max_tokens": 64}
    body |= {"wisp": {"trace": True, "draft": "lookup"}}
    plain = (await client.http.post(f"{stack.url}/chat/completions", json=body)).json()
    text = plain["choices"][0]["message"]["content"]
    words = text.split(" ")
    edited = " ".join([*words[:8], "blue", *words[9:20], "and", "so", *words[20:]])
    prediction = {"type": "content", "content": edited}
    answer = (await client.http.post(f"{stack.url}/chat/completions", json=body | {"prediction": prediction})).json()
    assert answer["choices"][0]["message"]["content"] == text
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 50
    assert 0 < details["rejected_prediction_tokens"] < 12
    rounds, before = answer["wisp"]["summary"]["rounds"], plain["wisp"]["summary"]["rounds"]
    print(f"{64 / rounds:.1f} tokens a round with the prediction, {64 / before:.1f} without")
    assert rounds < before / 2
