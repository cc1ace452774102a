"""One chaos run: a suite under load, the scheduled faults, and the checks at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.tools.chaos import invariants
from services.tools.chaos.client import ChaosClient
from services.tools.chaos.core.faults import Fault
from services.tools.chaos.core.requests import ChaosLoad
from services.tools.chaos.core.verdicts import ChaosResult, RequestOutcome, RequestVerdict
from services.tools.chaos.fault_runner import FaultRunner
from services.tools.chaos.reference import References
from services.tools.chaos.site import ChaosSite
from services.tools.local.progress import Progress, ProgressStep

SETTLE_S = 60.0
PROGRESS_S = 0.5


@dataclass(frozen=True)
class ChaosPlan:
    """The faults and the load of a run, and the suite that takes them."""

    target: Path
    faults: list[Fault]
    load: ChaosLoad
    clients: int
    lanes: int
    """Faults at a time."""
    env: Mapping[str, str] = field(default_factory=dict)
    env_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Settings of single services."""


async def run(plan: ChaosPlan, references: References, progress: Progress, show: Callable[[str], None]) -> ChaosResult:
    """Start a suite, inject the faults under load, and check the invariants.

    show: gets a line for each request that is wrong or lost. Raises WispError if a service ends by itself.
    """
    env = {"WISP_THREADS": "1", "WISP_ADMISSION": "false", "WISP_JOURNAL": "true", **plan.env}
    async with ChaosSite.open(
        plan.target, env=env, env_of=plan.env_of, progress=progress, clocks=plan.load.seed
    ) as site:
        return await site.stack.watch(_run(site, plan, references, progress, show))


async def _run(
    site: ChaosSite, plan: ChaosPlan, references: References, progress: Progress, show: Callable[[str], None]
) -> ChaosResult:
    began_s = time.monotonic()
    runner = FaultRunner(site)
    outcomes: list[RequestOutcome] = []
    with progress.step("faults under load") as step:
        watching = asyncio.create_task(_show_progress(runner, plan, outcomes, step))
        try:
            await _faults_under_load(runner, plan, references, outcomes, show)
        finally:
            watching.cancel()
        step.done(f"{len(runner.done)} faults, {len(outcomes)} requests")
    result = ChaosResult(runner.done, outcomes)
    with progress.step("checking what is left"):
        await _check(site, references, result)
    if result.problems:
        result.logs = site.stack.keep_logs()
    result.seconds = time.monotonic() - began_s
    return result


async def _faults_under_load(
    runner: FaultRunner,
    plan: ChaosPlan,
    references: References,
    outcomes: list[RequestOutcome],
    show: Callable[[str], None],
) -> None:
    """Let clients send requests until all faults are over; append the outcome of each request to `outcomes`."""
    client = ChaosClient(plan.target.name, runner.site.urls, references)
    over = asyncio.Event()

    async def ask(number: int) -> None:
        count = 0
        while not over.is_set():
            outcome = await client.ask(plan.load.request(number, count))
            outcomes.append(outcome)
            count += 1
            if outcome.verdict in (RequestVerdict.WRONG, RequestVerdict.LOST):
                show(f"{outcome.verdict}: {outcome.request.name} {outcome.detail[:300]}")

    async with asyncio.TaskGroup() as tasks:
        for number in range(plan.clients):
            tasks.create_task(ask(number))
        await runner.run(plan.faults, plan.lanes)
        over.set()


async def _show_progress(
    runner: FaultRunner, plan: ChaosPlan, outcomes: list[RequestOutcome], step: ProgressStep
) -> None:
    while True:
        current = ", ".join(f"{one.fault.kind} ({one.target})" for one in runner.done if not one.ended_s)
        step.detail(f"{len(runner.done)} of {len(plan.faults)}, {len(outcomes)} requests; {current}")
        await asyncio.sleep(PROGRESS_S)


async def _check(site: ChaosSite, references: References, result: ChaosResult) -> None:
    """Check every invariant, and add the problems to the result."""
    result.problems += [f"left behind: {left}" for left in await invariants.settled(site, SETTLE_S)]
    result.sessions, wrong = await invariants.wrong_states(site, list(references.of.values()))
    result.problems += [f"wrong in Redis: {one}" for one in wrong]
    result.results, result.run_results, wrong = await invariants.against_journal(site)
    result.problems += [f"in the journal and not in Redis: {one}" for one in wrong]
    result.poisoned, others = await invariants.dead_letters(site)
    result.problems += [f"{count} dead letters: {reason}" for reason, count in others.items()]
    result.conclude()
