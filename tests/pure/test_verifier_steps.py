"""Steps follow each other in the model's thread without the event loop, and each takes what is there when it begins."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import builders
import pytest
from memory_store import MemoryStore
from twins import make_twin

from services.verifier.core.acceptance import Verdict
from services.verifier.core.runs import Run
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.engine_thread import EngineThread
from services.verifier.membership import Membership
from services.verifier.sessions import SessionTable
from services.verifier.shared_runs import SharedRunTable
from services.verifier.steps import ModelSteps, StepWork
from shared.lookup import LONGEST_MATCH, LookupText
from shared.messages import Job, RunGrant, Sampling
from shared.state.store import Store
from shared.twin.engine import TwinEngine

LEASE = 7
GRANT = RunGrant(tokens=8, ms=60_000.0)


class Member:
    """A verifier's membership in the fleet."""

    lease = LEASE

    def is_fenced(self, lease: int) -> bool:
        return lease not in (0, self.lease)


@asynccontextmanager
async def held(thread: EngineThread) -> AsyncIterator[None]:
    """Keep the thread of an engine busy; what it is given meanwhile waits until the end of the context."""
    busy, gate = threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        gate.wait()

    holding = asyncio.ensure_future(thread.run(hold))
    try:
        await asyncio.to_thread(busy.wait)
        yield
    finally:
        gate.set()
        await holding


@pytest.fixture
def thread(tmp_path: Path) -> Iterator[EngineThread]:
    with ThreadPoolExecutor(1) as executor:
        yield EngineThread(TwinEngine(make_twin(tmp_path, step_ms=0.1).path), executor)


@pytest.fixture
async def sessions(thread: EngineThread) -> SessionTable:
    """The table of sessions, over a store that has all of them."""
    store = MemoryStore()
    for name in ("s", "run", "later", "gone", "stays", "forgotten", "fine"):
        await store.create(builders.stored_request(name, max_tokens=37), builders.PROMPT)
    return SessionTable(cast("Store", store), thread)


@pytest.fixture
def steps(thread: EngineThread, sessions: SessionTable) -> ModelSteps:
    return ModelSteps(sessions, thread, cast("Membership", Member()), grammars=None, emulated=None, digests=False)


async def work(sessions: SessionTable, *jobs: Job, lease: int = LEASE) -> StepWork:
    """A batch whose sessions are read."""
    await sessions.recall(jobs)
    return StepWork(builders.batch("b", *jobs, lease=lease), [(job, sessions.task(job)) for job in jobs])


async def test_a_step_takes_what_is_ready_when_it_begins(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps
) -> None:
    async with held(thread):
        steps.ready.append(await work(sessions, builders.job("run", run=GRANT)))
        first, second = thread.step(steps.compute), thread.step(steps.compute)
        steps.ready.append(await work(sessions, builders.job("later")))
    one, two = await first, await second
    assert [job.session for job in one.started] == ["run"]
    assert [run.job.session for run in two.runs] == ["run"], "its run has begun without the event loop"
    assert [job.session for job, _ in two.tasks] == ["later"]
    assert len(two.outcomes) == 2
    assert all(outcome.verdict is not None for outcome in two.outcomes)


async def test_a_step_without_work_computes_nothing(thread: EngineThread, steps: ModelSteps) -> None:
    done = await thread.step(steps.compute)
    assert (done.batch, done.outcomes, done.shapes, done.reports) == (None, [], [], [])


async def test_a_released_run_takes_part_in_no_step_that_waits(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps
) -> None:
    steps.ready.append(await work(sessions, builders.job("gone", run=GRANT), builders.job("stays", run=GRANT)))
    await thread.step(steps.compute)
    async with held(thread):
        waiting = thread.step(steps.compute)
        steps.runs.release(["gone"])
    assert [run.job.session for run in (await waiting).runs] == ["stays"]


def lose_lease(steps: ModelSteps) -> None:
    cast("Member", steps._membership).lease = LEASE + 1


ENDS: dict[str, tuple[Callable[[ModelSteps], object], int]] = {
    "a client that has left, or a stop string": (lambda s: s.runs.release(["run"]), 0),
    "a hand-over": (lambda s: s.runs.release(["run"]), 0),
    "a lost lease": (lose_lease, 0),
    "a commit that was lost to somebody else": (lambda s: s.runs.drop(cast("Run", s.runs.get("run"))), 0),
    "a deadline of somebody else": (lambda s: s.runs.halt(["run"]), 1),
    "a drain": (lambda s: s.runs.close(), 1),
    "a drafter that goes on with rounds": (lambda s: s.runs.join(builders.job("run")), 1),
}
"""What ends a run from outside, and the steps that it still takes part in: the last one's token is reported."""


@pytest.mark.parametrize("end", ENDS)
async def test_whatever_ends_a_run_ends_it_within_a_step(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps, end: str
) -> None:
    """Also where steps wait already for the one in progress."""
    happens, more = ENDS[end]
    steps.ready.append(await work(sessions, builders.job("run", run=RunGrant(tokens=30, ms=60_000.0))))
    await thread.step(steps.compute)
    assert [run.job.session for run in (await thread.step(steps.compute)).runs] == ["run"]
    async with held(thread):
        waiting = [thread.step(steps.compute) for _ in range(3)]
        happens(steps)
    assert [len((await step).runs) for step in waiting] == [1] * more + [0] * (3 - more)
    assert not steps.wanted


async def test_jobs_that_were_overtaken_are_left_to_the_commit_script(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps
) -> None:
    granted = builders.job("run", run=GRANT)
    steps.ready.append(await work(sessions, granted))
    steps.ready.append(await work(sessions, granted, builders.job("forgotten"), builders.job("fine")))
    sessions.drop("forgotten")
    await thread.step(steps.compute)
    done = await thread.step(steps.compute)
    assert [job.session for job, _ in done.tasks] == ["fine"]
    assert [job.session for job in done.stale] == ["run", "forgotten"]
    assert [run.job.session for run in done.runs] == ["run"], "one part of a step for each session"


async def test_runs_copy_in_steps_without_a_batch_only(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler plans a batch with one token of each run."""
    monkeypatch.setattr(LookupText, "continuation", lambda *_: ([5, 6, 7], LONGEST_MATCH))
    steps.ready.append(await work(sessions, builders.job("run", run=RunGrant(tokens=30, ms=60_000.0, copies=8))))
    await thread.step(steps.compute)
    steps.ready.append(await work(sessions, builders.job("later")))
    beside, alone = await thread.step(steps.compute), await thread.step(steps.compute)
    assert [(shape.jobs, shape.rows) for shape in beside.shapes] == [(2, 2)]
    assert [(shape.jobs, shape.rows > 1) for shape in alone.shapes] == [(1, True)]


async def test_a_batch_of_an_ended_lease_is_not_computed(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps
) -> None:
    steps.ready.append(await work(sessions, builders.job(), lease=LEASE - 1))
    done = await thread.step(steps.compute)
    assert (done.fenced, done.outcomes) == (True, [])


async def test_other_work_goes_before_a_step_that_waits(thread: EngineThread) -> None:
    order: list[str] = []
    async with held(thread):
        step = thread.step(lambda: order.append("step"))
        other = asyncio.ensure_future(thread.run(lambda: order.append("other")))
        await asyncio.sleep(0)
    await asyncio.gather(step, other)
    assert order == ["other", "step"]


async def test_no_step_computes_with_a_cache_that_is_wrong(
    thread: EngineThread, sessions: SessionTable, steps: ModelSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> None:
        raise AssertionError("a block is lost")

    steps.ready.append(await work(sessions, builders.job()))
    await thread.step(steps.compute)
    assert sessions.cached
    monkeypatch.setattr(thread.engine, "integrity", wrong)
    async with held(thread):
        checked = asyncio.ensure_future(sessions.check_integrity())
        await asyncio.sleep(0)
        step = thread.step(lambda: sessions.cached)
    await checked
    assert await step == {}


async def test_errors_of_the_thread_reach_its_waiters(thread: EngineThread) -> None:
    def fail() -> None:
        raise ValueError("no")

    for passed in (thread.run(fail), thread.step(fail)):
        with pytest.raises(ValueError, match="no"):
            await passed
    assert await thread.run(lambda: 3) == 3


async def test_cancelled_work_is_not_done(thread: EngineThread) -> None:
    done: list[int] = []
    async with held(thread):
        cancelled = asyncio.ensure_future(thread.run(lambda: done.append(1)))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    await thread.run(lambda: done.append(2))
    assert done == [2]


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns after a few operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_two_threads_share_the_table_of_runs(frequent_switches: None) -> None:
    table = SharedRunTable(digests=True)
    names = [f"s{number}" for number in range(20)]
    errors: list[BaseException] = []

    def start(session: str) -> None:
        job = builders.job(session, 2, 3, [9], run=RunGrant(tokens=3, ms=1e9))
        task = VerifyTask(session, [5, 6, 7], [9], Sampling(), frozenset(), 20)
        table.start(job, task, VerifyOutcome(Verdict(0, [8], None), 1, 4, 2), LEASE, 0.0)

    def compute(times: int) -> None:
        for number in range(times):
            for run in table.step(LEASE, 0.0):
                run.confirmed = True
                table.record(run, VerifyOutcome(Verdict(0, [number], None), 0, run.length, 1), 1.0, 0.0)
            for report in table.due(1e6, between_steps=True):
                table.reported(report)

    def disturb(times: int) -> None:
        for number in range(times):
            session = names[number % len(names)]
            start(session)
            table.halt([session, names[number * 7 % len(names)]])
            table.join(builders.job(session))
            table.release([names[number * 3 % len(names)]])

    def noting(part: Callable[[int], None]) -> Callable[[], Any]:
        def run() -> None:
            try:
                part(400)
            except BaseException as error:
                errors.append(error)

        return run

    threads = [threading.Thread(target=noting(part)) for part in (compute, disturb)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert errors == []
    compute(4)
    assert not table.decoding
