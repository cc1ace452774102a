"""The scheduler's rules of runs: after which rounds a verifier goes on with a session by itself, and how far.

A drafter leaves its session to the verifier for as many tokens as it expects drafts not to pay (`Verify.run_tokens`).
The scheduler grants a run unasked where a draft had no room in the batch, and where the session's rounds bring fewer
tokens per time than a run would, because its device or its link is slow. The drafter gets its turn after each run; runs
of this kind grow while it does not catch up.

Sessions without an SLO are not decoded in runs, and their runs are halted, while these runs' steps take longer than a
session of the verifier was promised for a token. Where only the copies make the steps that long, runs get none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from services.scheduler.core.batching import ChosenRound
from services.scheduler.core.mutable_shape import MutableShape
from services.scheduler.core.pool import ActiveSession, VerifierState
from services.scheduler.core.verifier_runs import ExpectedShape, RunPace
from shared import cost
from shared.cost.model import TYPICAL_LENGTH
from shared.messages import RunGrant, Verify
from shared.slo import HOPELESS_GAIN

MOST_TOKENS = 128
LONGEST_MS = 10_000.0
"""Limits of a run, so that a session whose drafter or scheduler is gone is soon scheduled again."""
FIRST_TOKENS = 4
"""Tokens of a session's first run that its drafter has not asked for."""
MEASURED_ROUNDS = 4
"""Rounds of a session before its speed in rounds is judged."""
TRUSTED_ROUNDS = 16
"""After this many rounds, a session's speed is that of its own rounds. Before, it is the drafter's expectation if that
is higher, since a few unlucky rounds mean little."""
GAIN = 1.15
"""An unasked run is granted only where it is faster than rounds by this factor (`HOPELESS_GAIN` for some)."""
LATE_MS = 250.0
"""A run without a report for this long, and a step more, may be lost."""
LOST_MS = 5000.0
"""A run without a report for this long has ended, or its verifier has stopped."""


def step_ms(state: VerifierState, length: int) -> float:
    """Return the predicted time of a step of the verifier's runs and one more session of this length, without copies.

    This is the shortest step: copies give way where a step with them would break a promise of one of several runs.
    """
    shape = state.runs.shape.copy()
    shape.add(1, length + 1, 1)
    return cost.predict_ms(state.model, shape)


def copying_step_ms(state: VerifierState, length: int, pace: RunPace) -> float:
    """Return the expected time of a step of the verifier's runs and one more session of this length and pace."""
    jobs, new_tokens, new_context, context, rows = state.runs.expected
    shape = ExpectedShape(
        jobs + 1,
        new_tokens + pace.rows,
        new_context + pace.rows * (length + 1),
        context + length + pace.rows,
        rows + pace.rows,
    )
    return cost.predict_ms(state.model, shape)


def tightest_ms(state: VerifierState) -> float:
    """Return the shortest time per token that a session of this verifier was promised; infinite without SLOs."""
    return _tightest(state, state.promised)


def too_long_for(session: ActiveSession, state: VerifierState) -> bool:
    """Return whether the steps of the verifier's runs take longer than a session was promised."""
    return session.tpot_ms is not None and cost.predict_ms(state.model, state.runs.shape) > _tightest(
        state, [session.tpot_ms]
    )


def _tightest(state: VerifierState, promised: Iterable[float]) -> float:
    """Return the shortest of these times that the verifier could keep for a session alone; others count as none."""
    alone_ms = cost.predict_ms(state.model, MutableShape(1, 1, TYPICAL_LENGTH, TYPICAL_LENGTH, 1))
    return min((tpot_ms for tpot_ms in promised if tpot_ms >= alone_ms), default=math.inf)


def unasked_tokens(session: ActiveSession, before: int, *, trimmed: bool, token_ms: float) -> int:
    """Return the length of the run that a session gets unasked, although its drafter drafts; 0 for none.

    before: tokens of its last such run; 0 if its last round brought none. trimmed: True if none of its draft had room
    in the batch. token_ms: time per token of the run.
    """
    tokens = session.round_tokens
    if session.timed_rounds < TRUSTED_ROUNDS:
        tokens = max(tokens, session.expected_tokens)
    hopeless = session.tpot_ms is not None and session.tpot_ms < token_ms
    gain = HOPELESS_GAIN if hopeless else GAIN
    slow = (
        session.timed_rounds >= MEASURED_ROUNDS
        and session.round_ms is not None
        and tokens * token_ms * gain < session.round_ms
    )
    if not (trimmed or slow):
        return 0
    return min(MOST_TOKENS, max(FIRST_TOKENS, 2 * before))


def granted(
    session: ActiveSession, state: VerifierState, chosen: ChosenRound, tightest_ms: float, *, copies: bool
) -> RunGrant | None:
    """Return the run that follows a round of the session; None where the session goes on with rounds.

    tightest_ms: the shortest time per token that a session of the verifier was promised. copies: allow copies.
    """
    verify = chosen.pending.verify
    grant_before, session.run_grant = session.run_grant, 0
    token_ms = step_ms(state, verify.base_len)
    if session.tpot_ms is None and token_ms > tightest_ms:
        return None
    copying_ms = copying_step_ms(state, verify.base_len, session.pace)
    own_promise = session.tpot_ms is not None and session.tpot_ms <= tightest_ms
    session.run_copies = copies and verify.run_copies > 0 and (own_promise or copying_ms <= tightest_ms)
    if session.run_copies:
        token_ms = copying_ms / session.pace.tokens
    tokens = min(verify.run_tokens, MOST_TOKENS)
    if not tokens:
        trimmed = bool(verify.draft) and not chosen.draft
        tokens = session.run_grant = unasked_tokens(session, grant_before, trimmed=trimmed, token_ms=token_ms)
    if not tokens:
        return None
    return RunGrant(tokens=tokens, ms=LONGEST_MS, copies=verify.run_copies if session.run_copies else 0)


def halts_unasked(session: ActiveSession, state: VerifierState, verify: Verify, now_ms: float) -> bool:
    """Return whether a round would halt a run that the session got unasked.

    A round that builds on more tokens than were reported here shows that the run is over; so does a late report.
    """
    run = state.runs.get(verify.session)
    if run is None or not session.run_grant:
        return False
    late_ms = LATE_MS + cost.predict_ms(state.model, state.runs.expected)
    follows = verify.base_len <= run.length and now_ms - run.reported_ms <= late_ms
    return follows and run.drafter_id == verify.drafter
