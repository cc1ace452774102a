"""Tables, ratios and sentences from the times of all arms.

Arms take turns: each repetition visits every arm with every case, and a visit gives one time. A ratio of two arms is
the median of the ratios within each repetition, so a slow spell of the machine affects both sides of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from services.tools.bench.engine.core.cases import EngineCase

OURS = "wisp"
"""First word of the names of the engine's own arms."""


@dataclass
class EngineTimes:
    """Milliseconds of each visit, for one number of threads and of cached tokens."""

    threads: int
    cached: int
    cases: list[EngineCase]
    arms: list[str]
    visits: dict[tuple[str, EngineCase], list[float]] = field(default_factory=dict)
    """By arm and case, in the order of the repetitions."""

    def add(self, arm: str, case: EngineCase, ms: float) -> None:
        """Add a visit."""
        self.visits.setdefault((arm, case), []).append(ms)

    def median_ms(self, arm: str, case: EngineCase) -> float:
        """Return the median time of a case."""
        return median(self.visits[arm, case])

    def speed_up(self, arm: str, against: str, case: EngineCase) -> float:
        """Return how many times as fast `arm` is as `against`."""
        pairs = zip(self.visits[arm, case], self.visits[against, case], strict=True)
        return median(other / own for own, other in pairs)

    def steps(self, arm: str, case: EngineCase) -> float:
        """Return the time of a case in decode steps of as many sessions with as many cached tokens."""
        decode = EngineCase("decode", case.sessions, case.cached)
        pairs = zip(self.visits[arm, case], self.visits[arm, decode], strict=True)
        return median(own / step for own, step in pairs)

    def records(self) -> list[dict[str, Any]]:
        """Return every visit for the result file."""
        return [
            {"threads": self.threads, "arm": arm, **case.record(), "ms": [round(ms, 3) for ms in visits]}
            for (arm, case), visits in self.visits.items()
        ]


def label(case: EngineCase) -> str:
    """Return a short name of a case."""
    sessions = f"{case.sessions} x " if case.sessions > 1 else ""
    return f"{sessions}{case.operation}{f' {case.new}' if case.operation == 'prefill' else ''}"


def times_table(times: EngineTimes) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: each arm's median of each case, and what verifying costs in decode steps."""
    verified = [case for case in times.cases if case.operation.startswith("verify") and case.sessions == 1]
    units = [f"{label(case)}, {'tokens/s' if case.operation == 'prefill' else 'ms'}" for case in times.cases]
    rows = [
        [arm, *(_figure(times, arm, case) for case in times.cases), *(times.steps(arm, case) for case in verified)]
        for arm in times.arms
    ]
    return ["arm", *units, *(f"{label(case)} / decode" for case in verified)], rows


def _figure(times: EngineTimes, arm: str, case: EngineCase) -> float:
    ms = times.median_ms(arm, case)
    return case.new * 1000 / ms if case.operation == "prefill" else ms


def speed_up_table(times: EngineTimes) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: how many times as fast each arm of the engine is as each other program's arm."""
    rows = [
        [arm, against, *(times.speed_up(arm, against, case) for case in times.cases)] for arm, against in _pairs(times)
    ]
    return ["arm", "times as fast as", *(label(case) for case in times.cases)], rows


def _pairs(times: EngineTimes) -> list[tuple[str, str]]:
    ours = [arm for arm in times.arms if arm.split()[0] == OURS]
    return [(arm, against) for arm in ours for against in times.arms if against not in ours]


def findings(times: EngineTimes) -> list[str]:
    """Return a sentence on each pair of arms of which ours is slower in any case."""
    notes = []
    for arm, against in _pairs(times):
        speed_ups = {label(case): times.speed_up(arm, against, case) for case in times.cases}
        if slower := [f"{name} ({speed_up:.2f})" for name, speed_up in speed_ups.items() if speed_up < 1]:
            notes.append(f"{_conditions(times)}: {arm} is slower than {against} in {', '.join(slower)}")
    return notes


def _conditions(times: EngineTimes) -> str:
    return f"{threads_of(times.threads)}, {times.cached} cached"


def threads_of(count: int) -> str:
    """Return "1 thread" or "2 threads"."""
    return f"{count} thread{'s' * (count > 1)}"
