"""Placement: the choice of the verifier for a session's next round.

Every session adds its round to each batch of its verifier, and sends a prompt now and then. A session's time per round
is therefore the period of a batch with all of the verifier's sessions and their share of the prompts, as the verifier's
own cost model predicts it; a faster verifier gets more sessions. KV that a verifier does not have must be computed
there first. Spread over the rounds that the session may still have, that is the price of moving it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from services.scheduler.core.mutable_shape import MutableShape
from services.scheduler.core.pool import PendingRound, VerifierState
from services.scheduler.core.round_queue import RoundQueue
from shared import cost
from shared.arithmetic import fits
from shared.messages import CostModel, features_of, model_of

ROUNDS_AHEAD = 16
"""Rounds over which the time of computing a session's KV again is spread: a guess at how many are still to come."""
GAIN = 0.8
"""A session moves only to a verifier that needs at most this share of the time for its rounds."""
ROUND_TOKENS = 3
"""Tokens of a typical round."""
MOST_PROMPTS = 0.9
"""Largest share of a verifier's time that prompts count for: more of them would make its batches endless."""


def home(pending: PendingRound, verifiers: Iterable[VerifierState]) -> VerifierState | None:
    """Return the usable verifier that holds most of the session's tokens."""
    holders = [v for v in verifiers if v.usable and v.holds(pending.session_id)]
    return max(holders, key=lambda v: (v.holds(pending.session_id), v.verifier_id), default=None)


def place(
    pending: PendingRound,
    verifiers: Iterable[VerifierState],
    queues: Mapping[str, RoundQueue],
    now_ms: float,
    *,
    migrate: bool,
    mix: bool,
    prompt_rate: float = 0.0,
    has_room: Callable[[VerifierState], bool] | None = None,
) -> VerifierState | None:
    """Return the verifier for a round; None while there is none for it.

    A session stays with its KV, unless it may `migrate` and another verifier would serve its rounds so much faster that
    computing the KV there again pays.
    prompt_rate: prompt tokens per millisecond that the verifiers have computed lately, all together.
    has_room: returns whether the session may begin there. By default, the verifiers' heartbeats show it.
    """
    if has_room is None:

        def has_room(verifier: VerifierState) -> bool:
            return verifier.heartbeat.free_tokens >= pending.length_after

    candidates = fitting(pending, verifiers, mix=mix)
    at_home = home(pending, candidates)
    if at_home is not None and (not migrate or len(candidates) == 1):
        return at_home
    roomy = [v for v in candidates if v is at_home or has_room(v)] or candidates
    session_rate = prompt_rate / (1 + sum(_others(pending, v) for v in candidates))
    times = {v.verifier_id: _time_ms(pending, v, queues[v.verifier_id], now_ms, session_rate) for v in roomy}
    best = min(roomy, key=lambda v: (times[v.verifier_id], v.verifier_id), default=None)
    if (
        at_home is not None
        and best is not None
        and not times[best.verifier_id] < GAIN * times.get(at_home.verifier_id, 0.0)
    ):
        return at_home
    return best


def fitting(pending: PendingRound, verifiers: Iterable[VerifierState], *, mix: bool) -> Sequence[VerifierState]:
    """Return the usable verifiers that may verify a round.

    They serve the session's model, with the features that it needs, in the arithmetic of its committed tokens. If none
    of these has this arithmetic, a session that may `mix` continues in another. If there is no such verifier, any
    verifier may refuse the round.
    """
    usable = [v for v in verifiers if v.usable]
    fingerprint = pending.verify.fingerprint
    of_model = [v for v in usable if v.heartbeat.fingerprint == model_of(fingerprint)]
    if needed := features_of(fingerprint):
        of_model = [v for v in of_model if needed <= set(v.heartbeat.features)]
    if not of_model:
        return usable
    same = [v for v in of_model if fits(v.heartbeat.arithmetic, pending.verify.committed_in)]
    return same or (of_model if mix else [])


def _others(pending: PendingRound, verifier: VerifierState) -> int:
    """Return the other sessions of a verifier."""
    return max(0, len(verifier.sessions) + len(verifier.unknown_sessions) - (pending.session_id in verifier.cached))


def _time_ms(
    pending: PendingRound, verifier: VerifierState, queue: RoundQueue, now_ms: float, session_rate: float
) -> float:
    """Return the predicted time of a round of the session on this verifier, averaged over its next rounds.

    session_rate: prompt tokens per millisecond of one session.
    """
    model, length = verifier.model, pending.length_after
    missing = pending.verify.base_len - pending.held(verifier.holds(pending.session_id))
    sessions = _others(pending, verifier) + 1
    once_ms = verifier.remaining_ms(now_ms)
    if missing <= ROUND_TOKENS:
        once_ms += queue.rounds_ms  # it does not wait behind prompts
    else:
        once_ms += queue.work_ms
        once_ms += cost.predict_ms(model, MutableShape(1, missing, missing * length, length, 1))
    return period_ms(model, sessions, length, sessions * session_rate) + once_ms / ROUNDS_AHEAD


def period_ms(model: CostModel, sessions: int, length: int, prompt_rate: float) -> float:
    """Return the predicted time of a batch of a round of each session and the prompts that arrive in this time.

    prompt_rate: prompt tokens per millisecond.
    """
    tokens = ROUND_TOKENS * sessions
    rounds_ms = cost.predict_ms(model, MutableShape(sessions, tokens, tokens * length, sessions * length, tokens))
    first_ms, later_ms = cost.prompt_token_ms(model, 0.0), cost.prompt_token_ms(model)
    room = max(0.0, model.knee - tokens)
    hidden_ms = rounds_ms / max(1.0 - MOST_PROMPTS, 1.0 - first_ms * prompt_rate)
    if prompt_rate * hidden_ms <= room:
        return hidden_ms
    return (rounds_ms - room * (later_ms - first_ms)) / max(1.0 - MOST_PROMPTS, 1.0 - later_ms * prompt_rate)
