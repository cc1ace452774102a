"""The order in which waiting rounds get into batches. Pure; the reason given travels with the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.scheduler.pool import Pending

Ordered = list[tuple[Pending, str]]
Policy = Callable[[Iterable[Pending], float], Ordered]


def fcfs(pending: Iterable[Pending], now_ms: float) -> Ordered:
    """First come, first served."""
    ordered = sorted(pending, key=lambda p: (p.arrived_ms, p.session))
    return [(p, f"waited {now_ms - p.arrived_ms:.0f} ms") for p in ordered]


def edf(pending: Iterable[Pending], now_ms: float) -> Ordered:
    """Earliest deadline first; rounds without an SLO after those with one, in order of arrival."""
    ordered = sorted(
        pending, key=lambda p: (p.due_ms is None, p.due_ms if p.due_ms is not None else p.arrived_ms, p.session)
    )
    return [(p, "no SLO" if p.due_ms is None else f"due in {p.due_ms - now_ms:.0f} ms") for p in ordered]


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "edf": edf}
