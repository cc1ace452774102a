"""A suite without drafters: schedulers stand in for them with the same text, and a drafter that joins takes over."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asking import Case, Client, Traffic, decode, progressed, watching
from patience import HANG_S

from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import Sampling

LONG = 600
"""Tokens of an answer that is still running when a service is started or killed."""


@pytest.fixture(scope="module")
async def undrafted(brokers: Brokers, target_folder: Path) -> AsyncIterator[Stack]:
    env = {
        "WISP_CACHE_TOKENS": "4096",
        "WISP_ADMISSION": "false",
        "WISP_STALL_TIMEOUT_S": str(HANG_S),
    }
    async with Stack(
        "test-undrafted", brokers=brokers, target=target_folder, drafters=0, schedulers=2, verifiers=1, env=env
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
def long_case(cases: list[Case], target_folder: Path) -> Case:
    """One question with a long answer, decoded by the bare engine."""
    engine, sampling = Engine(target_folder, budget_tokens=4096), Sampling(temperature=1.0, seed=7)
    prompt = cases[0].prompt
    return Case(prompt, sampling, decode(engine, prompt, sampling, set(), length=LONG))


async def ask_long(stack: Stack, client: Client, case: Case) -> list[int]:
    body = client.body(case, "auto") | {"max_tokens": LONG, "ignore_eos": True}
    answer = await client.http.post(f"{stack.url}/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [token["id"] for token in answer.json()["wisp"]["tokens"]]


async def test_the_text_is_the_targets_own(undrafted: Stack, asking: Client, cases: list[Case], seen: Traffic) -> None:
    seen.clear()
    for draft in ("auto", "lookup", "none"):
        assert await asking.ask_all(cases[:6], draft) == [case.tokens for case in cases[:6]], draft
    assert seen.drafters <= {f"{process.name}.pool" for process in undrafted.processes("scheduler")}
    assert any(result.run for result in seen.results)
    ready = await asking.http.get(f"{undrafted.url.removesuffix('/v1')}/ready")
    assert ready.json() == {**ready.json(), "ready": True, "without_drafters": ["pool"]}


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
    undrafted: Stack, asking: Client, long_case: Case, seen: Traffic
) -> None:
    seen.clear()
    stream = asyncio.create_task(ask_long(undrafted, asking, long_case))
    await progressed(seen, 20)
    assert not any(name.startswith("drafter") for name in seen.drafters)
    (drafter,) = await undrafted.start("drafter", env={"WISP_DRAFT_SOURCE": "lookup"})
    try:
        assert await stream == long_case.tokens
        assert drafter.name in seen.drafters, "the session ended before the drafter was ready"
        seen.clear()
        assert await ask_long(undrafted, asking, long_case) == long_case.tokens
        assert seen.drafters == {drafter.name}
    finally:
        await undrafted.stop(drafter)
