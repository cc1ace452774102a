"""Runs never change a completion: switched to and from at any token, beside rounds, through kills and freezes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from asking import Case, Client, Traffic, progressed

from services.tools.local.stack import Stack
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.messages import SILENT_MS, Halt

RUNS = {"WISP_WITHOUT": "[]"}


@pytest.fixture(scope="module")
async def with_runs(stack: Stack) -> AsyncIterator[None]:
    """Two schedulers under which verifiers decode by themselves, in place of the one without runs."""
    before = stack.processes("scheduler")
    await stack.start("scheduler", 2, env=RUNS)
    for process in before:
        await stack.stop(process)
    yield
    new = stack.processes("scheduler")
    await stack.start("scheduler")
    for process in new:
        await stack.stop(process)


@asynccontextmanager
async def halting(stack: Stack, traffic: Traffic) -> AsyncIterator[None]:
    """Halt runs at random."""
    rng = random.Random(5)
    broker = await Broker.connect(stack.brokers.amqp_url, Topology(stack.namespace), "halting")

    async def halt() -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.0, 0.1))
            for result in traffic.results[-rng.randint(1, 8) :]:
                await broker.publish(Halt(sessions=[result.session]), topology.batch(result.verifier))

    task = asyncio.create_task(halt())
    try:
        yield
    finally:
        task.cancel()
        await broker.close()


def by_origin(traffic: Traffic) -> tuple[int, int]:
    """Return how many tokens came from runs, and how many from rounds."""
    runs = sum(len(result.tokens) for result in traffic.results if result.run)
    return runs, sum(len(result.tokens) for result in traffic.results if not result.run)


@pytest.mark.usefixtures("with_runs")
async def test_switched_to_and_from_at_random(
    stack: Stack, client: Client, cases: list[Case], traffic: Traffic
) -> None:
    async with halting(stack, traffic):
        for draft in ("none", "lookup", "combined"):
            traffic.clear()
            answers = await client.ask_all(cases, draft)
            assert answers == [case.tokens for case in cases], draft
            runs, rounds = by_origin(traffic)
            assert runs > 20, draft
            assert rounds > 20, draft
            assert any(result.copied for result in traffic.results) is (draft != "none"), draft


@pytest.mark.usefixtures("with_runs")
@pytest.mark.parametrize("fault", ["verifier", "drafter", "scheduler", "freeze"])
async def test_when_a_service_fails_in_the_middle_of_runs(
    stack: Stack, client: Client, cases: list[Case], traffic: Traffic, fault: str
) -> None:
    traffic.clear()
    streams = asyncio.create_task(client.ask_all(cases, "none"))
    await progressed(traffic, 30)
    assert any(result.run_left for result in traffic.results)
    if fault == "freeze":
        frozen = stack.processes("verifier")[0]
        os.kill(frozen.pid, signal.SIGSTOP)
        await asyncio.sleep(SILENT_MS / 1000 + 1.0)
        os.kill(frozen.pid, signal.SIGCONT)
    else:
        await stack.stop(stack.processes(fault)[0], signal.SIGKILL)
    try:
        assert await streams == [case.tokens for case in cases]
    finally:
        if fault != "freeze":
            await stack.start(fault, env=RUNS if fault == "scheduler" else {})
