"""Records of the scheduler: pending rounds, active sessions, and the verifiers with their caches and batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from services.scheduler.core.verifier_runs import ONE_TOKEN, RunPace, VerifierRuns
from shared import cost
from shared.messages import CostModel, Heartbeat, Result, Verify

DEFAULT_ACCEPTANCE = 0.5
"""Acceptance probability of a draft token whose drafter predicts none."""
SMOOTHING = 0.2
STALL = 4.0
"""A session that is away for this many times its usual time has stalled (an outage, a sleeping device). The time of a
stall does not predict the next rounds."""
FIRST_ROUNDS = 4
"""Rounds after which a session's own average counts as much as the average of all sessions."""

RECOVERY_TOKENS = 16
"""Tokens within which a run makes up for a step that a prompt has lengthened: a guess at the tokens still to come."""


@dataclass
class PendingRound:
    """A round that waits for a batch or is being verified. Times are on the scheduler's clock, in milliseconds."""

    verify: Verify
    arrived_ms: float
    due_ms: float | None
    """When the session's next token is due; None without an SLO."""
    longest: int = 16
    """Most draft tokens that may be verified; the rest of the draft is ignored."""
    survival: list[float] = field(init=False)
    """For each draft token that may be verified, the probability that it and all before it are accepted: the tokens
    that verifying it is expected to bring."""

    def __post_init__(self) -> None:
        length = min(self.longest, len(self.verify.draft))
        predicted = self.verify.acceptance[:length]
        predicted = predicted + [DEFAULT_ACCEPTANCE] * (length - len(predicted))
        self.survival = list(accumulate(predicted, mul))

    @property
    def session_id(self) -> str:
        """Id of the round's session."""
        return self.verify.session

    def deadline_ms(self, max_wait_ms: float) -> float:
        """Return when the round should be verified at the latest.

        This is when its token is due, but never before the round arrived and never more than `max_wait_ms` after that.
        Late rounds therefore take turns in order of arrival, and each round goes before all that arrive `max_wait_ms`
        later, whatever their SLO: no round starves.
        """
        latest = self.arrived_ms + max_wait_ms
        return latest if self.due_ms is None else min(max(self.due_ms, self.arrived_ms), latest)

    @property
    def draft_length(self) -> int:
        """Draft tokens that may be verified."""
        return len(self.survival)

    @property
    def length_after(self) -> int:
        """The session's length in the verifier's cache while this round is verified."""
        return self.verify.base_len + self.draft_length

    def held(self, cached: int) -> int:
        """Return the usable ones of `cached` tokens. The last committed token is always computed, for its logits."""
        return min(cached, self.verify.base_len - 1)


@dataclass
class InFlight:
    """A batch that was sent and has jobs without a result."""

    batch_id: str
    jobs: dict[str, PendingRound]
    """The rounds without a result, by session."""
    sent_ms: float
    predicted_ms: float
    prefill_to: dict[str, int] = field(default_factory=dict)
    """Lengths that chunks of prompts in it extend the cache to, by session."""


@dataclass
class ActiveSession:
    """A session with rounds still to come."""

    service_class: str
    tpot_ms: float | None
    due_ms: float | None = None
    """When its next token is due, as predicted from its rounds and results."""
    length: int = 0
    """Committed length to which `due_ms` applies: the token after it is due then."""
    seen_ms: float = 0.0
    verifier_id: str | None = None
    """Verifier of its pending round, or of its last one."""
    resulted_ms: float | None = None
    """When its last result arrived."""
    away_ms: float | None = None
    """Part of its rounds in which they are neither pending nor being verified: a moving average."""
    rounds: int = 0
    tokens: int = 0
    """Tokens that its rounds have brought."""
    round_ms: float | None = None
    """Time from a result to the result of the next round: a moving average."""
    round_tokens: float = 1.0
    """Tokens that a round after the first brings: a moving average."""
    expected_tokens: float = 1.0
    """Tokens that its drafter expects of a round: a moving average."""
    expected_rounds: int = 0
    """Rounds that `expected_tokens` is made of."""
    timed_rounds: int = 0
    """Rounds that `round_ms` is made of."""
    run_grant: int = 0
    """Tokens of its last run, if nobody asked for it; 0 if its last round got none or its drafter asked for it."""
    run_copies: bool = False
    """True if its last run may copy."""
    pace: RunPace = ONE_TOKEN
    """Pace of its runs that may copy."""

    def tokens_per_round(self, usual: float) -> float:
        """Return the tokens that its next round is expected to bring.

        usual: average of all sessions, which counts as much as `FIRST_ROUNDS` rounds of this one.
        """
        return (self.tokens + FIRST_ROUNDS * usual) / (self.rounds + FIRST_ROUNDS)

    def advance(self, length: int) -> int:
        """Take the committed length of a result; return the number of its tokens that no earlier result has brought."""
        new = max(0, length - self.length)
        self.length += new
        return new

    def record_result(self, now_ms: float, here_ms: float, tokens: int) -> float | None:
        """Record the result of a round that was pending and in verification for `here_ms`.

        Returns how long the session was away before it; None if that is unknown or was a stall.
        """
        before_ms, self.resulted_ms = self.resulted_ms, now_ms
        self.rounds += 1
        self.tokens += tokens
        if before_ms is None:
            return None
        self.round_tokens += max(SMOOTHING, 1 / (self.timed_rounds + 1)) * (tokens - self.round_tokens)
        away_ms = max(0.0, now_ms - before_ms - here_ms)
        usual_ms = self.away_ms
        # A stall counts for little, but it counts: the device may have become that slow.
        most_ms = math.inf if usual_ms is None else STALL * max(usual_ms, 1.0)
        away_ms_limited = min(away_ms, most_ms)
        self.away_ms = _averaged(usual_ms, away_ms_limited)
        self.round_ms = _averaged(self.round_ms, away_ms_limited + here_ms)
        self.timed_rounds += 1
        return away_ms if away_ms <= most_ms else None

    def record_expected(self, tokens: float) -> None:
        """Record the tokens that the drafter expects of a round after the first."""
        self.expected_rounds += 1
        self.expected_tokens += max(SMOOTHING, 1 / self.expected_rounds) * (tokens - self.expected_tokens)

    @property
    def run_pace(self) -> RunPace:
        """Expected pace of its present run."""
        return self.pace if self.run_copies else ONE_TOKEN

    def record_run(self, now_ms: float, tokens: int, result: Result) -> None:
        """Record tokens that were decoded in a run: each of its steps is a round.

        tokens: those of the result's that no earlier one has brought.
        """
        steps = result.run_steps
        self.resulted_ms = now_ms
        self.rounds += min(tokens, steps)
        self.tokens += tokens
        if self.run_copies and result.tokens:
            self.pace = self.pace.after(steps, steps + result.trimmed_to, len(result.tokens))


def _averaged(before: float | None, measured: float) -> float:
    return measured if before is None else before + SMOOTHING * (measured - before)


@dataclass(frozen=True)
class UnknownSession:
    """A session in a verifier's cache that this scheduler has received no round of: another one has."""

    cached: int
    """Its tokens in the cache."""
    seen_ms: float
    """When its verifier was last seen to work on it."""


@dataclass
class VerifierState:
    """One verifier as the scheduler sees it."""

    heartbeat: Heartbeat
    seen_ms: float
    model: CostModel = cost.FALLBACK
    cached: dict[str, int] = field(default_factory=dict)
    """Tokens in its KV cache, by session."""
    spared: dict[str, int] = field(default_factory=dict)
    """Tokens by session that need no room of their own, because sessions with the same beginning share their KV."""
    in_flight: list[InFlight] = field(default_factory=list)
    """At most two batches: one that runs, one prepared behind it."""
    runs: VerifierRuns = field(default_factory=VerifierRuns)
    """Sessions that it decodes in runs: each is a row of every step."""
    idle_since_ms: float = 0.0
    returning: dict[str, float] = field(default_factory=dict)
    """Expected arrival of the next round, by session."""
    sessions: dict[str, ActiveSession] = field(default_factory=dict)
    """Active sessions whose rounds go to it."""
    promised: Counter[float] = field(default_factory=Counter)
    """These sessions' promised times per token, each with its number of sessions."""
    unknown_sessions: dict[str, UnknownSession] = field(default_factory=dict)
    """Sessions in its cache that this scheduler has received no round of, as of its last heartbeat."""
    gap_ms: float = 0.0
    """Idle time between two of its batches: a moving average."""
    timed_batch: str = ""
    """The latest batch whose predicted time was compared with the measured one."""

    @property
    def verifier_id(self) -> str:
        """Id of the verifier."""
        return self.heartbeat.verifier

    @property
    def usable(self) -> bool:
        """True if new batches may be sent to it."""
        return not self.heartbeat.draining

    def assign(self, session_id: str, session: ActiveSession) -> None:
        """Note that a session's rounds go to it."""
        self.sessions[session_id] = session
        if session.tpot_ms is not None:
            self.promised[session.tpot_ms] += 1

    def unassign(self, session_id: str) -> None:
        """Note that a session's rounds no longer go to it."""
        session = self.sessions.pop(session_id)
        if session.tpot_ms is not None:
            self.promised[session.tpot_ms] -= 1
            if not self.promised[session.tpot_ms]:
                del self.promised[session.tpot_ms]

    def holds(self, session_id: str) -> int:
        """Return the tokens of a session in its cache, those of chunks in flight included."""
        held = self.cached.get(session_id, 0)
        return max([held, *(flight.prefill_to.get(session_id, 0) for flight in self.in_flight)])

    def remaining_ms(self, now_ms: float) -> float:
        """Return the predicted time until all batches sent to it are done, or the step of its runs in progress."""
        if self.runs and not self.in_flight:
            return self.step_left_ms(now_ms)
        left = 0.0
        for i, flight in enumerate(self.in_flight):
            elapsed = now_ms - flight.sent_ms if i == 0 else 0.0
            left += max(0.0, flight.predicted_ms - elapsed)
        return left

    def soonest_due_ms(self, sessions: Mapping[str, ActiveSession], until_ms: float) -> float | None:
        """Return the earliest due time of the sessions that are expected back with a round before `until_ms`."""
        due = [
            session.due_ms
            for session_id, at in self.returning.items()
            if at < until_ms and (session := sessions.get(session_id)) is not None and session.due_ms is not None
        ]
        return min(due, default=None)

    def step_left_ms(self, now_ms: float) -> float:
        """Return the predicted time until the present step of its runs ends. Reports come at the ends of steps."""
        step_ms = cost.predict_ms(self.model, self.runs.expected)
        since_ms = now_ms - self.runs.reported_ms
        return step_ms - since_ms % step_ms if step_ms > 0 else 0.0

    def runs_due_ms(self, sessions: Mapping[str, ActiveSession], start_ms: float) -> list[float]:
        """Return the latest end of a step that starts at `start_ms`, for each session with an SLO in a run.

        Each step before it brings the tokens of the run's pace. A run that is faster than its SLO asks makes up for a
        long step within the next `RECOVERY_TOKENS` tokens.
        """
        step_ms = max(1e-3, cost.predict_ms(self.model, self.runs.expected))
        due = []
        for session_id, run in self.runs.items():
            session = sessions.get(session_id)
            if session is None or session.due_ms is None or session.tpot_ms is None:
                continue
            before = max(0, round((start_ms - run.reported_ms) / step_ms)) * run.pace.tokens
            spare_ms = RECOVERY_TOKENS * max(0.0, session.tpot_ms - step_ms / run.pace.tokens)
            due.append(session.due_ms + before * session.tpot_ms + spare_ms)
        return due
