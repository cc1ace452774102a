"""The table of a run. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from services.tools.chaos.client import Outcome, Verdict
from services.tools.chaos.core.faults import Kind
from services.tools.chaos.fault_runner import Hit
from services.tools.chaos.run import Verdicts

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
"""A request that waited longer for something new has been hit, even if its client had nothing to do about it."""


def rows(verdicts: Verdicts) -> list[tuple[Any, ...]]:
    """One row for each kind of fault, and their sum. A request counts for every fault that it lived through."""
    table = []
    for kind in Kind:
        hits = [hit for hit in verdicts.hits if hit.fault.kind is kind]
        if hits:
            during = [one for one in verdicts.outcomes if any(_during(one, hit) for hit in hits)]
            back = sorted(hit.ended_s - hit.began_s for hit in hits)
            table.append((kind.value, len(hits), back[len(back) // 2], *_counts(during, verdicts)))
    return [*table, ("all", len(verdicts.hits), None, *_counts(verdicts.outcomes, verdicts))]


def _during(outcome: Outcome, hit: Hit) -> bool:
    return outcome.started_s <= hit.ended_s and hit.began_s <= outcome.ended_s


def _counts(outcomes: Sequence[Outcome], verdicts: Verdicts) -> tuple[int, int, int, float, int, int]:
    found = Counter(one.verdict for one in outcomes)
    recovered = sum(
        one.verdict in (Verdict.RIGHT, Verdict.LEFT) and (one.troubled or one.longest_stall_s > STALLED_S)
        for one in outcomes
    )
    excused = sum(one.verdict is Verdict.ERROR and verdicts.excused(one) for one in outcomes)
    stall = max((one.longest_stall_s for one in outcomes), default=0.0)
    return (
        len(outcomes),
        recovered,
        excused,
        stall,
        found[Verdict.WRONG],
        found[Verdict.LOST] + found[Verdict.ERROR] - excused,
    )


def notes(verdicts: Verdicts) -> list[str]:
    """What the table does not say."""
    found = Counter(one.verdict for one in verdicts.outcomes)
    resumed = sum(one.resumed for one in verdicts.outcomes)
    refused = sum(one.refused for one in verdicts.outcomes)
    return [
        f"{len(verdicts.outcomes)} requests in {verdicts.seconds:.0f} s: {found[Verdict.RIGHT]} right, "
        f"{found[Verdict.LEFT]} left by their clients, {found[Verdict.ERROR]} ended in an error; "
        f"clients resumed streams {resumed} times and asked again {refused} times",
        f"{verdicts.sessions} sessions in Redis compared with the model token for token, and {verdicts.results} "
        "results in the journal with Redis; "
        f"{verdicts.poisoned} poisoned messages found among the dead letters",
        "recovered: right although the client had to ask again or to resume, or waited longer than "
        f"{STALLED_S:g} s; a request counts for every fault that it lived through",
    ]
