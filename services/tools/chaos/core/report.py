"""The table and the notes of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from services.tools.chaos.core.faults import FaultKind
from services.tools.chaos.core.verdicts import ChaosResult, RequestOutcome, RequestVerdict

COLUMNS = (
    "fault",
    "times",
    "back after s (median)",
    "requests during it",
    "recovered",
    "clear error",
    "longest stall s",
    "wrong",
    "lost",
)
STALLED_S = 2.0
"""A request that waits longer than this for new tokens counts as affected, even if its client did not have to act."""


def rows(result: ChaosResult) -> list[tuple[Any, ...]]:
    """Return one row for each kind of fault, and a total. A request counts for every fault that it overlaps."""
    table = []
    for kind in FaultKind:
        faults = [one for one in result.faults if one.fault.kind is kind]
        if faults:
            during = [
                outcome
                for outcome in result.outcomes
                if any(outcome.overlaps(one.began_s, one.ended_s) for one in faults)
            ]
            back_s = sorted(one.ended_s - one.began_s for one in faults)
            table.append((kind.value, len(faults), back_s[len(back_s) // 2], *_counts(during, result)))
    return [*table, ("all", len(result.faults), None, *_counts(result.outcomes, result))]


def _counts(outcomes: Sequence[RequestOutcome], result: ChaosResult) -> tuple[int, int, int, float, int, int]:
    by_verdict = Counter(one.verdict for one in outcomes)
    recovered = sum(
        one.verdict in (RequestVerdict.RIGHT, RequestVerdict.LEFT) and (one.troubled or one.longest_stall_s > STALLED_S)
        for one in outcomes
    )
    excused = sum(one.verdict is RequestVerdict.ERROR and result.excused(one) for one in outcomes)
    stall_s = max((one.longest_stall_s for one in outcomes), default=0.0)
    lost = by_verdict[RequestVerdict.LOST] + by_verdict[RequestVerdict.ERROR] - excused
    return len(outcomes), recovered, excused, stall_s, by_verdict[RequestVerdict.WRONG], lost


def notes(result: ChaosResult) -> list[str]:
    """Return sentences that complete the table."""
    resumed = sum(one.resumed for one in result.outcomes)
    refused = sum(one.refused for one in result.outcomes)
    return [
        f"{len(result.outcomes)} requests in {result.seconds:.0f} s: {result.count(RequestVerdict.RIGHT)} right, "
        f"{result.count(RequestVerdict.LEFT)} left by their clients, {result.count(RequestVerdict.ERROR)} ended with "
        f"an error; clients resumed streams {resumed} times and retried {refused} times",
        f"compared token for token: {result.sessions} sessions in Redis with the model, and {result.results} results "
        f"({result.run_results} of runs) in the journal with Redis; {result.poisoned} poison messages are among "
        "the dead letters",
        "recovered: right although the client had to retry or to resume, or waited longer than "
        f"{STALLED_S:g} s for new tokens; a request counts for every fault that it overlaps",
    ]
