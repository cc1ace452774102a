"""The baselines over HTTP, with the real model: the same text as the suite, and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asking import Case, Client
from patience import HANG_S

from services.tools.local.ports import free_ports
from services.tools.local.stack import Stack

CACHE_TOKENS = 1280
"""Too few for all cases at once, so that sessions wait and are preempted."""


@pytest.fixture(scope="module", params=["centralized", "colocated"])
async def baseline(request: pytest.FixtureRequest, target_folder: Path) -> AsyncIterator[Stack]:
    env = {"WISP_CACHE_TOKENS": str(CACHE_TOKENS), "WISP_ADMISSION": "false", "WISP_THREADS": "1"}
    own = {"baseline": {"WISP_METRICS_PORT": str(free_ports(1)[0])}}
    async with Stack("test-baseline", serving=request.param, target=target_folder, env=env, env_of=own) as running:
        yield running


@pytest.fixture
async def asking(baseline: Stack) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(timeout=HANG_S) as http:
        yield Client(http, baseline)


async def test_a_baseline_gives_the_same_text(baseline: Stack, asking: Client, cases: list[Case]) -> None:
    answers = await asking.ask_all(cases)
    assert [i for i, (case, answer) in enumerate(zip(cases, answers, strict=True)) if answer != case.tokens] == []
    one = await asking.http.post(f"{baseline.url}/completions", json=asking.body(cases[0], "auto"))
    summary = one.json()["wisp"]["summary"]
    assert (summary["drafted"] > 0) == (baseline.serving == "colocated")
    if baseline.serving == "centralized":
        assert summary["rounds"] == summary["tokens"], "plain decoding makes one token per step"


async def test_every_option_gives_the_same_text(asking: Client, option_cases: list[Case]) -> None:
    answers = await asking.ask_all(option_cases)
    assert [(c.options, a) for c, a in zip(option_cases, answers, strict=True) if a != c.tokens] == []


async def test_the_metrics_port_reports_readiness(baseline: Stack, asking: Client) -> None:
    port = baseline.env_of["baseline"]["WISP_METRICS_PORT"]
    for path in ("ready", "live"):
        answer = await asking.http.get(f"http://127.0.0.1:{port}/{path}")
        assert (answer.status_code, answer.text) == (200, "ok\n")


async def test_an_abandoned_session_frees_its_memory(baseline: Stack, asking: Client, cases: list[Case]) -> None:
    prompt = cases[0].prompt
    body = {"model": baseline.target.name, "prompt": prompt, "max_tokens": CACHE_TOKENS - len(prompt), "stream": True}
    body["ignore_eos"] = True
    for _ in range(3):
        # Each could fill the whole cache and would run for minutes.
        async with asking.http.stream("POST", f"{baseline.url}/completions", json=body) as stream:
            await anext(stream.aiter_lines())
    async with asyncio.timeout(HANG_S):
        assert await asking.ask(cases[1]) == cases[1].tokens


async def test_a_session_that_does_not_fit_is_refused(baseline: Stack, asking: Client, cases: list[Case]) -> None:
    body = asking.body(cases[0], "auto") | {"prompt": cases[0].prompt * 60}
    answer = await asking.http.post(f"{baseline.url}/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(CACHE_TOKENS) in error["message"]
