"""A simulated campaign: all points of all arms, side by side in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context

from services.tools.bench.load.arms import Arm
from services.tools.bench.load.campaign import CapacitySearch
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.results import LoadResults, MeasuredPoint
from services.tools.bench.load.core.search import next_sessions
from services.tools.local.progress import Progress, ProgressStep
from services.tools.simulator.arms import SimulatedPoint, simulate
from services.tools.simulator.core.scenario import Scenario

AIM = 0.95
"""Share of requests that must attain their SLO at the capacity."""


@dataclass(frozen=True)
class SimulationPlan:
    """The arms and points to simulate."""

    scenario: Scenario
    arms: Sequence[Arm]
    sessions: Sequence[int]
    search: CapacitySearch | None
    repeats: int
    seed: int
    window: Window


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """Start processes that simulate points. After an error or an interrupt, points in progress are given up."""
    others = {child.pid for child in active_children()}
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            if child.pid not in others:
                child.terminate()
        raise
    pool.shutdown()


class SimulationCampaign:
    """Simulates the points of a plan, and holds their results."""

    def __init__(self, plan: SimulationPlan, progress: Progress) -> None:
        self.plan = plan
        self.results = LoadResults(window=plan.window, aims=[AIM] if plan.search else [])
        self._progress = progress
        self._pending: dict[Future[MeasuredPoint], SimulatedPoint] = {}

    def run(self, pool: Executor) -> None:
        """Simulate all points. An interrupt keeps the results until then."""
        with self._progress.step("simulating") as step:
            for arm in self.plan.arms:
                for sessions in self.plan.sessions:
                    self._submit(pool, arm, sessions)
                if not self.plan.sessions:
                    self._search_on(pool, arm)
            try:
                while self._pending:
                    done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._take(future, step)
                        arm = self._pending.pop(future).arm
                        if not any(point.arm == arm for point in self._pending.values()):
                            self._search_on(pool, arm)
            finally:
                order = {arm.name: number for number, arm in enumerate(self.plan.arms)}
                self.results.points.sort(key=lambda one: (order[one.arm], one.sessions, one.repeat))
            step.done(f"simulated {len(self.results.points)} points")

    def _submit(self, pool: Executor, arm: Arm, sessions: int) -> None:
        for repeat in range(self.plan.repeats):
            point = SimulatedPoint(arm, sessions, repeat, self.plan.seed + repeat)
            self._pending[pool.submit(_measures, point, self.plan.scenario, self.plan.window)] = point

    def _search_on(self, pool: Executor, arm: Arm) -> None:
        """Simulate the next number of sessions of an arm's search, if it needs one."""
        search = self.plan.search
        if search is None:
            return
        found = next_sessions(
            self.results.tried(arm.name), AIM, first=search.first, most=search.most, tolerance=search.tolerance
        )
        if found is not None:
            self._submit(pool, arm, found)

    def _take(self, future: Future[MeasuredPoint], step: ProgressStep) -> None:
        measured = future.result()
        self.results.points.append(measured)
        measures = measured.measures
        step.detail(
            f"{measured.arm}, {measured.sessions} sessions: {measures.attained} of {measures.requests} requests "
            f"attained, {measures.goodput:.0f} tokens/s of them; points to go: {len(self._pending) - 1}"
        )


def _measures(point: SimulatedPoint, scenario: Scenario, window: Window) -> MeasuredPoint:
    """Run a point; return its measures without the records, which would have to be copied between processes."""
    return simulate(point, scenario, window)[0]
