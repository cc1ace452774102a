"""One run: a suite under load, faults by schedule, and the judgement."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.tools.chaos import invariants
from services.tools.chaos.client import Client, Outcome, Verdict
from services.tools.chaos.core.faults import Fault
from services.tools.chaos.core.requests import Load
from services.tools.chaos.fault_runner import Hit, Hits
from services.tools.chaos.reference import References
from services.tools.chaos.site import Site
from services.tools.local.progress import Progress

SETTLE_S = 60.0
BACK_S = 10.0
"""So long after a server that lost its data is back may services still be finding their feet."""
LOST_CODES = frozenset({"session_gone", "stream_gone", "timeout", "cancelled"})
"""Errors that say that what a session was is gone, or that it was given up."""


@dataclass(frozen=True)
class Plan:
    """What is done."""

    target: Path
    faults: list[Fault]
    load: Load
    clients: int
    lanes: int
    env: Mapping[str, str] = field(default_factory=dict)
    env_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass
class Verdicts:
    """What came of a run."""

    hits: list[Hit]
    outcomes: list[Outcome]
    sessions: int = 0
    """Sessions whose committed tokens were compared."""
    results: int = 0
    """Recorded results that were compared with Redis."""
    problems: list[str] = field(default_factory=list)
    """Whatever must not be."""
    seconds: float = 0.0
    poisoned: int = 0
    """Dead letters that were meant to be."""
    logs: Path | None = None
    """The services' logs, where there are problems."""

    def excused(self, outcome: Outcome) -> bool:
        """Whether a request may have ended in an error: the data that it needed was lost meanwhile."""
        lost = [hit for hit in self.hits if hit.fault.kind.loses_data]
        return outcome.code in LOST_CODES and any(
            hit.began_s <= outcome.ended_s and outcome.started_s <= hit.ended_s + BACK_S for hit in lost
        )

    def count(self, verdict: Verdict) -> int:
        """Requests with this verdict."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    def conclude(self) -> None:
        """Name every request that was answered wrong, was lost, or ended in an error that nothing excuses."""
        for one in self.outcomes:
            bad = one.verdict in (Verdict.WRONG, Verdict.LOST)
            if bad or (one.verdict is Verdict.ERROR and not self.excused(one)):
                self.problems.append(
                    f"request {one.request.name} ({one.request.manner}, sessions {', '.join(one.sessions) or 'none'}) "
                    f"is {one.verdict}: {one.detail}"
                )


async def run(plan: Plan, references: References, progress: Progress, told: Callable[[str], None]) -> Verdicts:
    """Start everything, let things fail, and judge. Raises WispError when a service ends by itself."""
    env = {"WISP_THREADS": "1", "WISP_ADMISSION": "false", "WISP_JOURNAL": "true", **plan.env}
    async with Site.open(plan.target, env=env, env_of=plan.env_of, progress=progress, clocks=plan.load.seed) as site:
        return await site.stack.watch(_run(site, plan, references, progress, told))


async def _run(
    site: Site, plan: Plan, references: References, progress: Progress, told: Callable[[str], None]
) -> Verdicts:
    began_s = time.monotonic()
    hits = Hits(site)
    client = Client(plan.target.name, site.urls, references)
    over = asyncio.Event()
    outcomes: list[Outcome] = []

    async def ask(number: int) -> None:
        count = 0
        while not over.is_set():
            outcomes.append(await client.ask(plan.load.request(number, count)))
            count += 1
            if outcomes[-1].verdict in (Verdict.WRONG, Verdict.LOST):
                told(f"{outcomes[-1].verdict}: {outcomes[-1].request.name} {outcomes[-1].detail[:300]}")

    with progress.step("faults under load") as step:

        async def watch() -> None:
            while True:
                now = [hit for hit in hits.done if not hit.ended_s]
                shown = ", ".join(f"{hit.fault.kind} ({hit.target})" for hit in now)
                step.detail(f"{len(hits.done)} of {len(plan.faults)}, {len(outcomes)} requests; {shown}")
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(plan.clients):
                    tasks.create_task(ask(number))
                await hits.do(plan.faults, plan.lanes)
                over.set()
        finally:
            watching.cancel()
        step.done(f"{len(hits.done)} faults, {len(outcomes)} requests")
    verdicts = Verdicts(hits.done, outcomes)
    with progress.step("checking what is left"):
        verdicts.problems += [f"left behind: {left}" for left in await invariants.settled(site, SETTLE_S)]
        verdicts.sessions, wrong = await invariants.wrong_states(site, list(references.of.values()))
        verdicts.problems += [f"wrong in Redis: {one}" for one in wrong]
        verdicts.results, wrong = await invariants.against_journal(site)
        verdicts.problems += [f"in the journal and not in Redis: {one}" for one in wrong]
        verdicts.poisoned, others = await invariants.dead_letters(site)
        verdicts.problems += [f"{count} dead letters: {reason}" for reason, count in others.items()]
        verdicts.conclude()
        if verdicts.problems:
            verdicts.logs = site.stack.keep_logs()
        verdicts.seconds = time.monotonic() - began_s
    return verdicts
