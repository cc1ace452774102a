"""Scheduling never changes a completion, under any policy: mixed SLOs, prompts in chunks, trimmed drafts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from asking import Case, Client, Traffic, decode

from services.scheduler.core.policies import POLICIES
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import Sampling, Status
from shared.models.folder import AUTO, ModelFolder
from shared.models.text import Tokenizer

SLO_HEADERS: list[dict[str, str]] = [
    {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "20"},  # cannot be met here
    {"x-slo-ttft-ms": "5000", "x-slo-tpot-ms": "300"},
    {},
]


@pytest.fixture(scope="module")
def long_cases(target_folder: Path) -> list[Case]:
    """Prompts of some hundred tokens, which do not fit a short batch."""
    folder = ModelFolder(target_folder)
    tokenizer = Tokenizer(folder)
    engine = Engine(target_folder, dtype=ModelFolder(target_folder).resolved(AUTO), budget_tokens=4096)
    found = []
    for number, sampling in enumerate((Sampling(), Sampling(temperature=0.8, seed=5))):
        facts = " ".join(f"Fact {n}: house {n * 7 + number} is painted in colour {n * 13 % 10}." for n in range(22))
        prompt = tokenizer.render_chat([{"role": "user", "content": f"{facts} Which house is painted first?"}])
        found.append(Case(prompt, sampling, decode(engine, prompt, sampling, set(folder.eos_ids))))
    return found


@pytest.fixture(scope="module")
async def schedule(stack: Stack) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Replaces the running scheduler by one with a policy and short batches, until the tests here end."""

    async def replace(env: dict[str, str]) -> None:
        before = stack.processes("scheduler")
        await stack.start("scheduler", env=env)
        for process in before:
            await stack.stop(process)

    async def by(policy: str) -> None:
        short = {"WISP_MAX_BATCH_MS": "150", "WISP_SLED_BATCH": "5", "WISP_MAX_WAIT_MS": "2000"}
        await replace({"WISP_POLICY": policy, "WISP_WITHOUT": "[]", **short})

    yield by
    await replace({})


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_gives_the_same_completions(
    schedule: Callable[[str], Awaitable[None]],
    client: Client,
    cases: list[Case],
    long_cases: list[Case],
    traffic: Traffic,
    policy: str,
) -> None:
    asked = [*cases, *long_cases]
    await schedule(policy)
    traffic.clear()
    answers = await asyncio.gather(
        *(
            client.ask(case, draft="combined", headers=SLO_HEADERS[number % len(SLO_HEADERS)])
            for number, case in enumerate(asked)
        )
    )
    assert [i for i, (case, answer) in enumerate(zip(asked, answers, strict=True)) if answer != case.tokens] == []
    assert max(len(case.prompt) for case in long_cases) > 300
    if not POLICIES[policy].static:
        assert any(result.status is Status.PREFILLED for result in traffic.results), "long prompts come in chunks"
    if "trimming" in POLICIES[policy].parts:
        committed = [result for result in traffic.results if result.status is Status.COMMITTED]
        assert any(result.trimmed_to < result.drafted for result in committed), "drafts are trimmed"
