"""A suite without drafters: schedulers stand in for them with the same text, and a drafter that joins takes over.

The model is tiny and each of its batches takes a fixed time, so that answers last while services come and go.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asking import QUESTIONS, SAMPLINGS, Case, Client, Traffic, decode, progressed, watching
from gateway_peer import eventually, eventually_answers
from link import link_to
from patience import HANG_S

from services.tools.bench.support.tiny import tiny_model
from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

LONG = 600
"""Tokens of an answer that is still running when a service is started or killed."""
BATCH_MS = 15


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
async def undrafted(brokers: Brokers, tiny: Path) -> AsyncIterator[Stack]:
    env = {
        "WISP_CACHE_TOKENS": "4096",
        "WISP_THREADS": "1",
        "WISP_ADMISSION": "false",
        "WISP_STALL_TIMEOUT_S": str(HANG_S),
    }
    cost = {"WISP_PROFILE": "false", "WISP_EMULATED_COST": json.dumps([BATCH_MS, 0, 0, 0, 0, 0, 0])}
    async with Stack(
        "test-undrafted",
        brokers=brokers,
        target=tiny,
        drafters=0,
        schedulers=2,
        verifiers=1,
        env=env,
        env_of={"verifier": cost},
    ) as running:
        yield running


@pytest.fixture(scope="module")
async def seen(undrafted: Stack) -> AsyncIterator[Traffic]:
    async with watching(undrafted) as traffic:
        yield traffic


@pytest.fixture
async def asking(undrafted: Stack) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(timeout=HANG_S) as http:
        yield Client(http, undrafted)


@pytest.fixture(scope="module")
def tiny_cases(tiny: Path) -> list[Case]:
    """Questions with a short answer, greedy and sampled, decoded by the bare engine."""
    folder = ModelFolder(tiny)
    tokenizer, engine = Tokenizer(folder), Engine(tiny, budget_tokens=4096)
    found = []
    for question in QUESTIONS[:2]:
        prompt = tokenizer.render_chat([{"role": "user", "content": question}])
        found += [Case(prompt, one, decode(engine, prompt, one, set(folder.eos_ids))) for one in SAMPLINGS]
    return found


@pytest.fixture(scope="module")
def long_case(tiny: Path, tiny_cases: list[Case]) -> Case:
    """One question with a long answer, decoded by the bare engine."""
    engine, sampling = Engine(tiny, budget_tokens=4096), Sampling(temperature=1.0, seed=7)
    prompt = tiny_cases[0].prompt
    return Case(prompt, sampling, decode(engine, prompt, sampling, set(), length=LONG))


async def ask_long(stack: Stack, client: Client, case: Case, tokens: int = LONG) -> list[int]:
    body = client.body(case, "auto") | {"max_tokens": tokens, "ignore_eos": True}
    answer = await client.http.post(f"{stack.url}/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [token["id"] for token in answer.json()["wisp"]["tokens"]]


async def test_the_text_is_the_targets_own(
    undrafted: Stack, asking: Client, tiny_cases: list[Case], seen: Traffic
) -> None:
    seen.clear()
    for draft in ("auto", "lookup", "none"):
        assert await asking.ask_all(tiny_cases, draft) == [case.tokens for case in tiny_cases], draft
    assert seen.drafters <= {f"{process.name}.pool" for process in undrafted.processes("scheduler")}
    assert any(result.run for result in seen.results)

    async def reported() -> bool:
        ready = (await asking.http.get(f"{undrafted.url.removesuffix('/v1')}/ready")).json()
        assert ready["ready"], ready
        return bool(ready.get("without_drafters") == ["pool"])

    # A scheduler waits for heartbeats before it reports that a pool has no drafter; the answers may be faster.
    await eventually_answers(reported)


async def test_when_the_active_scheduler_is_killed(
    undrafted: Stack, asking: Client, long_case: Case, seen: Traffic
) -> None:
    seen.clear()
    # Both schedulers stand in: of two requests each has one, whichever of them is active.
    streams = [asyncio.create_task(ask_long(undrafted, asking, long_case)) for _ in range(2)]
    await progressed(seen, 60)
    killed = undrafted.processes("scheduler")[0]
    await undrafted.stop(killed, signal.SIGKILL)
    try:
        assert await asyncio.gather(*streams) == [long_case.tokens] * 2
    finally:
        await undrafted.start("scheduler")
    assert len(seen.drafters) == 2


async def test_a_running_session_moves_to_a_drafter_that_joins(
    undrafted: Stack, brokers: Brokers, asking: Client, long_case: Case, seen: Traffic
) -> None:
    seen.clear()
    async with link_to(brokers.amqp_url) as link:
        # It has started, and joins as soon as RabbitMQ answers.
        link.flowing.clear()
        joining = asyncio.create_task(
            undrafted.start("drafter", env={"WISP_DRAFT_SOURCE": "lookup", "WISP_AMQP_URL": link.url})
        )
        await eventually(lambda: link.connections > 0)
        stream = asyncio.create_task(ask_long(undrafted, asking, long_case))
        await progressed(seen, 20)
        assert not any(name.startswith("drafter") for name in seen.drafters)
        link.flowing.set()
        (drafter,) = await joining
        try:
            assert await stream == long_case.tokens
            assert drafter.name in seen.drafters, "the session ended before the drafter was ready"
            seen.clear()
            assert await ask_long(undrafted, asking, long_case, 32) == long_case.tokens[:32]
            assert seen.drafters == {drafter.name}
        finally:
            await undrafted.stop(drafter)
