"""The comparison of a point on the twin with the same point in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.tools.bench.load.core.measures import Measures
from services.tools.bench.load.core.results import MeasuredPoint

AGREEMENT = 0.05
"""Greatest difference of two figures that agree."""

Figure = Callable[[Measures], float | None]

FIGURES: dict[str, Figure] = {
    "attained %": lambda one: None if one.attainment is None else 100 * one.attainment,
    "tokens/s": lambda one: one.throughput,
    "goodput": lambda one: one.goodput,
    "tokens/round": lambda one: one.drafting.tokens_per_round if one.drafting else None,
    "batch": lambda one: one.batches.jobs if one.batches else None,
    "TTFT p50": lambda one: one.ttft_ms.p50 if one.ttft_ms else None,
    "TPOT p50": lambda one: one.tpot_ms.p50 if one.tpot_ms else None,
    "TPOT p90": lambda one: one.tpot_ms.p90 if one.tpot_ms else None,
}
"""The compared figures by name."""
COLUMNS = ["arm", "n", *FIGURES, "rounds/s", "late %"]


def compared(twin: MeasuredPoint, simulated: MeasuredPoint, measure_s: float) -> list[Any]:
    """Return a row for `COLUMNS`: of each figure the twin's, the simulator's and the difference in percent.

    measure_s: length of the window, for the twin's rounds per second.
    """
    cells = []
    for name in FIGURES:
        ours, theirs = (FIGURES[name](one.measures) for one in (twin, simulated))
        both = "" if ours is None or theirs is None else f"{ours:.3g} / {theirs:.3g}"
        off = difference(twin, simulated, name)
        cells.append(both if off is None else f"{both} {off:+.0%}")
    late = None if twin.late_share is None else 100 * twin.late_share
    rounds = twin.measures.drafting.rounds / measure_s if twin.measures.drafting else None
    return [twin.arm, twin.sessions, *cells, rounds, late]


def difference(twin: MeasuredPoint, simulated: MeasuredPoint, name: str) -> float | None:
    """Return the difference of a figure as a share of the simulator's; None where one of them lacks it or is 0."""
    ours, theirs = (FIGURES[name](one.measures) for one in (twin, simulated))
    return ours / theirs - 1 if ours is not None and theirs else None
