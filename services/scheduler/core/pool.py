"""What the scheduler knows: the rounds that wait, the sessions, and the verifiers with what they hold and do. Plain
records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from shared import cost
from shared.messages import Batch, CostModel, Heartbeat, Verify

BLOCK = 64
"""Prompts are split at multiples of this many tokens, the engine's block size."""
UNTOLD = 0.5
"""Chance of a draft token whose drafter does not say."""
SMOOTHING = 0.2
STALL = 4.0
"""So many times its usual time away is a stall (an outage, a device asleep) and tells nothing about the next rounds."""
FIRST_ROUNDS = 4
"""Rounds after which a session's own count as much as what is usual."""


@dataclass
class Pending:
    """A round that waits, or is being verified. Times are the scheduler's own clock, in milliseconds."""

    verify: Verify
    arrived_ms: float
    due_ms: float | None
    """When the session's next token is due; None without an SLO."""
    longest: int = 16
    """Draft tokens that may be verified; what is over it is not looked at."""
    survival: list[float] = field(init=False)
    """For each draft token that may be verified, the chance that it and all before it are accepted: what verifying it
    is worth, in tokens."""

    def __post_init__(self) -> None:
        length = min(self.longest, len(self.verify.draft))
        told = self.verify.acceptance[:length]
        told = told + [UNTOLD] * (length - len(told))
        self.survival = list(accumulate(told, mul))

    @property
    def session(self) -> str:
        """The session's name."""
        return self.verify.session

    def deadline_ms(self, max_wait_ms: float) -> float:
        """When the round should be verified at the latest: when its token is due, but never before it arrived and never
        more than `max_wait_ms` after that.

        So late rounds take turns in order of arrival, and each round comes before all that arrive `max_wait_ms` later,
        whatever these are promised: nothing starves.
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
        """Usable cached tokens: the last committed one is always computed again, for its logits."""
        return min(cached, self.verify.base_len - 1)


@dataclass
class InFlight:
    """A batch that was sent and has jobs without a result."""

    batch: Batch
    jobs: dict[str, Pending]
    sent_ms: float
    predicted_ms: float


@dataclass
class Known:
    """A session that is under way."""

    service_class: str
    tpot_ms: float | None
    due_ms: float | None = None
    """When its next token is due, as far as its rounds and results have told."""
    seen_ms: float = 0.0
    verifier: str | None = None
    """Where its next round goes, or went last."""
    resulted_ms: float | None = None
    """When its last result came."""
    away_ms: float | None = None
    """Part of its rounds in which they neither wait nor are verified: a moving average."""
    rounds: int = 0
    tokens: int = 0
    """What its rounds brought."""

    def tokens_per_round(self, usual: float) -> float:
        """What its next rounds are expected to bring, by its own rounds and by what is usual."""
        return (self.tokens + FIRST_ROUNDS * usual) / (self.rounds + FIRST_ROUNDS)

    def resulted(self, now_ms: float, here_ms: float, tokens: int) -> float | None:
        """A result came, of a round that waited and was verified for `here_ms`. Returns how long it was away before;
        None if that is not known, or tells nothing because it was a stall."""
        before_ms, self.resulted_ms = self.resulted_ms, now_ms
        self.rounds += 1
        self.tokens += tokens
        if before_ms is None:
            return None
        away_ms = max(0.0, now_ms - before_ms - here_ms)
        if self.away_ms is None:
            self.away_ms = away_ms
            return away_ms
        # A stall counts for little, but it counts: the device may have become that slow.
        usual_ms, most_ms = self.away_ms, STALL * max(self.away_ms, 1.0)
        self.away_ms += SMOOTHING * (min(away_ms, most_ms) - usual_ms)
        return away_ms if away_ms <= most_ms else None


@dataclass
class VerifierState:
    """One verifier as the scheduler sees it."""

    heartbeat: Heartbeat
    seen_ms: float
    model: CostModel = cost.FALLBACK
    cached: dict[str, int] = field(default_factory=dict)
    in_flight: list[InFlight] = field(default_factory=list)
    idle_since_ms: float = 0.0
    returning: dict[str, float] = field(default_factory=dict)
    """Sessions whose next round is expected, by the time at which it should arrive."""
    assigned: int = 0
    """Sessions under way whose rounds go to it."""
    strangers: int = 0
    """Sessions that it holds K/V of and that this scheduler has not heard of."""
    gap_ms: float = 0.0
    """Recent time between two of its batches, in which it had nothing to do."""

    @property
    def name(self) -> str:
        """The verifier's name."""
        return self.heartbeat.verifier

    @property
    def usable(self) -> bool:
        """Whether new batches may be sent to it."""
        return not self.heartbeat.draining

    def remaining_ms(self, now_ms: float) -> float:
        """Predicted time until everything sent to it is done."""
        left = 0.0
        for i, flight in enumerate(self.in_flight):
            elapsed = now_ms - flight.sent_ms if i == 0 else 0.0
            left += max(0.0, flight.predicted_ms - elapsed)
        return left

    def soonest_due_ms(self, known: Mapping[str, Known], until_ms: float) -> float | None:
        """The earliest due time of the sessions that are expected back with a round before `until_ms`."""
        due = [
            session.due_ms
            for name, at in self.returning.items()
            if at < until_ms and (session := known.get(name)) is not None and session.due_ms is not None
        ]
        return min(due, default=None)
