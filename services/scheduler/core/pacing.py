"""Pacing: the time at which the next batch goes to a verifier.

A batch has a fixed cost, whatever is in it: the weights are read once. Sessions that were verified together come back
together, a draft and a few hops later. A batch sent the moment a verifier falls idle would split them into groups that
take turns, each paying the fixed cost alone. An idle verifier therefore waits for sessions that are about to return, as
long as the wait is short against that fixed cost. A second batch is prepared behind the one in flight only where
waiting cannot make it better: it is already full, or no session in flight is coming back soon.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from services.scheduler.core.pool import VerifierState
from services.scheduler.core.round_queue import RoundQueue
from shared import cost

NEVER = math.inf

GATHER_SHARE = 0.25
"""Longest wait for returning sessions, as a share of the batch's fixed cost."""
LATE_MS = 2.0
"""A session that is this much later than expected is no longer waited for."""
LEAD_MS = 8.0
"""A prepared batch is sent this long before the verifier is predicted to be free: a hop, and some error."""
RUNS_LEAD_SHARE = 0.25
"""Beside runs it is sent this share of the batch in flight before its end, if that is earlier: a batch that comes late
misses a whole step."""


def gather_until(verifier: VerifierState, now_ms: float) -> float | None:
    """Return until when an idle verifier should wait for returning sessions; None to send now."""
    limit_ms = GATHER_SHARE * cost.fixed_ms(verifier.model)
    latest = verifier.idle_since_ms + limit_ms
    expected = [at for at in verifier.returning.values() if now_ms < at + LATE_MS and at <= latest]
    if not expected or now_ms >= latest:
        return None
    return min(max(expected) + LATE_MS, latest)


def prepare_at(verifier: VerifierState, now_ms: float) -> float:
    """Return when to prepare a second batch behind the one in flight."""
    if len(verifier.in_flight) != 1:
        return NEVER
    lead_ms = LEAD_MS
    if verifier.runs:
        lead_ms = max(LEAD_MS, RUNS_LEAD_SHARE * verifier.in_flight[0].predicted_ms)
    return now_ms + max(0.0, verifier.remaining_ms(now_ms) - lead_ms)


def coming_back(verifier: VerifierState, return_ms: Callable[[str], float]) -> bool:
    """Return whether a session in flight will be back so soon that the next batch should wait for it.

    return_ms: predicted time from a result to the next round, by drafter.
    """
    soon_ms = GATHER_SHARE * cost.fixed_ms(verifier.model)
    return any(return_ms(p.verify.drafter) <= soon_ms for flight in verifier.in_flight for p in flight.jobs.values())


def filled_at(queue: RoundQueue, size: int, fill_ms: float) -> float:
    """Return when a static batch of `size` rounds goes out: when full, or `fill_ms` after its first round arrived."""
    first = next(queue.by("arrival"), None)
    if first is None:
        return NEVER
    return first.pending.arrived_ms + (0.0 if len(queue) >= size else fill_ms)
