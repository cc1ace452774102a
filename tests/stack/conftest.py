"""The suite with the real model, shared by all tests here, and the completions that it must give."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import QUESTIONS, SAMPLINGS, Case, Client, Traffic, decode, watching
from patience import HANG_S

from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import LogitRules, Sampling, TokenBias
from shared.models.folder import AUTO, ModelFolder
from shared.models.prepare import prepare
from shared.models.text import Tokenizer


@pytest.fixture(scope="session")
def target_folder() -> Path:
    """The prepared default target."""
    return prepare("smollm2-135m-instruct", Path(".wisp/models"))


@pytest.fixture(scope="session")
def cases(target_folder: Path) -> list[Case]:
    """Every question with every sampling, decoded by the bare engine token by token."""
    tokenizer = Tokenizer(ModelFolder(target_folder))
    eos = set(ModelFolder(target_folder).eos_ids)
    engine = Engine(target_folder, dtype=ModelFolder(target_folder).resolved(AUTO), budget_tokens=4096)
    found = []
    for question in QUESTIONS:
        prompt = tokenizer.render_chat([{"role": "user", "content": question}])
        found += [Case(prompt, sampling, decode(engine, prompt, sampling, eos)) for sampling in SAMPLINGS]
    return found


@pytest.fixture(scope="session")
def option_cases(target_folder: Path) -> list[Case]:
    """A question with every option, greedy and sampled, decoded by the bare engine token by token."""
    folder = ModelFolder(target_folder)
    tokenizer = Tokenizer(folder)
    engine = Engine(target_folder, dtype=ModelFolder(target_folder).resolved(AUTO), budget_tokens=4096)
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


@pytest.fixture(scope="session")
async def stack(brokers: Brokers, target_folder: Path) -> AsyncIterator[Stack]:
    """Two drafters and two verifiers behind one gateway without admission control.

    Drafts are verified untrimmed, and sessions whose drafts do not pay go on with rounds: test_exactness_runs.py has
    runs.
    """
    env = {
        "WISP_CACHE_TOKENS": "4096",
        "WISP_ADMISSION": "false",
        # Eighteen sessions at once take minutes on a slow CPU.
        "WISP_STALL_TIMEOUT_S": str(HANG_S),
        "WISP_MAX_BACKLOG_MS": str(HANG_S * 1000),
    }
    whole = {"scheduler": {"WISP_WITHOUT": '["trimming", "runs"]', "WISP_MAX_BATCH_MS": "5000"}}
    async with Stack(
        "test-stack", brokers=brokers, target=target_folder, drafters=2, verifiers=2, env=env, env_of=whole
    ) as running:
        yield running


@pytest.fixture(scope="session")
async def traffic(stack: Stack) -> AsyncIterator[Traffic]:
    """The recorded traffic between the services."""
    async with watching(stack) as seen:
        yield seen


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    """A client of the gateway."""
    async with httpx.AsyncClient(timeout=HANG_S) as http:
        yield Client(http, stack)
