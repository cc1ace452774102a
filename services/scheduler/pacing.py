"""When to send the next batch to a verifier. Pure.

A batch has a fixed cost, whatever is in it (reading the weights once). Sessions that were verified together come back
together, a draft and a few hops later; sending what waits the moment a verifier falls idle would split them into groups
that take turns, each paying the fixed cost alone. So an idle verifier waits for sessions that are about to return, as
long as the wait is short against that fixed cost. A second batch is prepared behind the one in flight only where
waiting cannot make it better: it is already full, or nobody in flight is coming back soon.
"""

from __future__ import annotations

from collections.abc import Callable

from services.scheduler.batching import Plan
from services.scheduler.pool import VerifierState

GATHER_SHARE = 0.25
"""Longest wait for returning sessions, as a share of the batch's fixed cost."""
LATE_MS = 2.0
"""A session this much later than expected is not waited for any more."""
LEAD_MS = 8.0
"""A prepared batch is sent this long before the verifier is predicted to be free: a hop, and some error."""


def gather_until(verifier: VerifierState, now_ms: float) -> float | None:
    """Until when an idle verifier should wait for returning sessions; None to send now."""
    limit_ms = GATHER_SHARE * verifier.model.coefficients[0]
    latest = verifier.idle_since_ms + limit_ms
    expected = [at for at in verifier.returning.values() if now_ms < at + LATE_MS and at <= latest]
    if not expected or now_ms >= latest:
        return None
    return min(max(expected) + LATE_MS, latest)


def prepare_at(verifier: VerifierState, plan: Plan, return_ms: Callable[[str], float], now_ms: float) -> float | None:
    """When to send `plan` behind the batch in flight; None to wait until that one is done.

    `return_ms` predicts how long after its result a session's next round arrives.
    """
    if len(verifier.in_flight) != 1:
        return None
    soon_ms = GATHER_SHARE * verifier.model.coefficients[0]
    coming_back = any(return_ms(p.verify.drafter) <= soon_ms for p in verifier.in_flight[0].jobs.values())
    if coming_back and not plan.full:
        return None
    return now_ms + max(0.0, verifier.remaining_ms(now_ms) - LEAD_MS)
