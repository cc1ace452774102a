"""Options on logits give the same text, whoever drafts, whatever shares the batch, and in the baselines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import QUESTIONS, Case, Client, Traffic, decode
from patience import HANG_S

from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import LogitRules, Sampling, TokenBias
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer


@pytest.fixture(scope="module")
def option_cases(target_folder: Path) -> list[Case]:
    """A question with every option, greedy and sampled, decoded by the bare engine token by token."""
    folder = ModelFolder(target_folder)
    tokenizer = Tokenizer(folder)
    engine = Engine(target_folder, budget_tokens=4096)
    eos = set(folder.eos_ids)
    (the,) = tokenizer.encode(" the")
    ends = {str(token): 12.0 for token in eos}
    letters = sorted({token for text in QUESTIONS for token in tokenizer.encode(text)} | eos)
    options: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"presence_penalty": 1.5}, {}),
        ({"frequency_penalty": 0.8}, {}),
        ({"repetition_penalty": 1.3}, {}),
        ({"logit_bias": {str(the): 5.0}}, {"logit_bias": [TokenBias(token=the, bias=5.0)]}),
        ({"min_p": 0.1}, {}),
        (
            {"min_tokens": 9, "logit_bias": ends},
            {
                "withheld_ids": list(folder.eos_ids),
                "logit_bias": [TokenBias(token=int(token), bias=bias) for token, bias in ends.items()],
            },
        ),
        ({"bad_words": ["the", "of"]}, {"bad_words": [*tokenizer.spellings("the"), *tokenizer.spellings("of")]}),
        ({"allowed_token_ids": letters}, {}),
    ]
    found = []
    for number, (given, meant) in enumerate(options):
        prompt = tokenizer.render_chat([{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}])
        rules = LogitRules.model_validate({**given, "prompt_len": len(prompt), **meant})
        samplings = (Sampling(rules=rules), Sampling(temperature=0.8, top_p=0.9, seed=number, rules=rules))
        found += [Case(prompt, one, decode(engine, prompt, one, eos), given) for one in samplings]
    free = [decode(engine, c.prompt, c.sampling.model_copy(update={"rules": None}), eos) for c in found]
    changed = [case for case, tokens in zip(found, free, strict=True) if case.tokens != tokens]
    assert len(changed) > len(found) / 2, "the options change these texts"
    return found


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


@pytest.fixture(params=["centralized", "colocated"])
async def baseline(request: pytest.FixtureRequest, target_folder: Path) -> AsyncIterator[Stack]:
    env = {"WISP_CACHE_TOKENS": "4096", "WISP_ADMISSION": "false", "WISP_THREADS": "1"}
    async with Stack("test-baseline-options", serving=request.param, target=target_folder, env=env) as running:
        yield running


async def test_every_option_in_a_baseline(baseline: Stack, option_cases: list[Case]) -> None:
    async with httpx.AsyncClient(timeout=HANG_S) as http:
        answers = await Client(http, baseline).ask_all(option_cases)
    assert [(c.options, a) for c, a in zip(option_cases, answers, strict=True) if a != c.tokens] == []


async def test_options_that_leave_no_token_are_a_clear_400(stack: Stack, client: Client) -> None:
    body = {"model": stack.target.name, "prompt": [5, 6], "allowed_token_ids": [9], "min_tokens": 1}
    answer = await client.http.post(f"{stack.url}/completions", json=body | {"stop_token_ids": [9]})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "no_token_allowed"
