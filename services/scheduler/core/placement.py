"""Which verifier a session's next round goes to. Pure.

Every session adds its round to each batch of its verifier, so what a session gets from a verifier is the period of a
batch that holds all of the verifier's sessions, as its own cost model predicts it: a faster one gets more sessions. K/V
that a verifier does not have must be computed there first; spread over the rounds that a session may still have, that
is the price of moving it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.scheduler.core.mutable_shape import Tally
from services.scheduler.core.pool import Pending, VerifierState
from services.scheduler.core.round_queue import Queue, added_ms
from shared import cost

ROUNDS_AHEAD = 16
"""Rounds over which the time of computing a session's K/V again is spread: a guess at how many it will still have."""
GAIN = 0.8
"""A session moves only to a verifier that gives it a round in this share of the time, or less."""
ROUND_TOKENS = 3
"""Tokens of a typical round."""


def home(pending: Pending, verifiers: Iterable[VerifierState]) -> VerifierState | None:
    """The usable verifier that holds most of the session's tokens."""
    holders = [v for v in verifiers if v.usable and v.cached.get(pending.session)]
    return max(holders, key=lambda v: (v.cached[pending.session], v.name), default=None)


def place(
    pending: Pending, verifiers: Iterable[VerifierState], queues: Mapping[str, Queue], now_ms: float, migrate: bool
) -> VerifierState | None:
    """The verifier for a round; None while there is no usable one.

    A session stays with the K/V that it has, unless it may `migrate` and another verifier would give it its rounds so
    much faster that computing the K/V there again is worth it. When no verifier serves the session's model, any of them
    may say so.
    """
    usable = [v for v in verifiers if v.usable]
    at_home = home(pending, usable)
    if at_home is not None and (not migrate or len(usable) == 1):
        return at_home
    fitting = [v for v in usable if v.heartbeat.fingerprint == pending.verify.fingerprint] or usable
    roomy = [v for v in fitting if v is at_home or v.heartbeat.free_tokens >= pending.length_after] or fitting
    times = {v.name: _time_ms(pending, v, queues[v.name], now_ms) for v in roomy}
    best = min(roomy, key=lambda v: (times[v.name], v.name), default=None)
    if at_home is not None and best is not None and not times[best.name] < GAIN * times.get(at_home.name, 0.0):
        return at_home
    return best


def _time_ms(pending: Pending, verifier: VerifierState, queue: Queue, now_ms: float) -> float:
    """What a round of the session would take on this verifier, now and in the rounds after."""
    model, length = verifier.model, pending.length_after
    missing = pending.verify.base_len - pending.held(verifier.cached.get(pending.session, 0))
    others = verifier.assigned + verifier.strangers - (pending.session in verifier.cached)
    period_ms = cost.fixed_ms(model) + (others + 1) * added_ms(model, ROUND_TOKENS, length, ROUND_TOKENS)
    once_ms = verifier.remaining_ms(now_ms) + queue.work_ms
    if missing > ROUND_TOKENS:
        once_ms += cost.predict_ms(model, Tally(1, missing, missing * length, length, 1))
    return period_ms + once_ms / ROUNDS_AHEAD
