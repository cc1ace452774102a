"""What the scheduler knows: the rounds that wait, and the verifiers with what they hold and do. Plain records."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared import cost
from shared.messages import Batch, CostModel, Heartbeat, Verify


@dataclass
class Pending:
    """A round that waits, or is being verified. Times are the scheduler's own clock, in milliseconds."""

    verify: Verify
    arrived_ms: float
    due_ms: float | None
    """When the session's next token is due; None without an SLO."""

    @property
    def session(self) -> str:
        """The session's name."""
        return self.verify.session

    def new_tokens(self, cached: int) -> int:
        """Tokens to compute where `cached` of the session's are held: what is missing, the last one, the draft."""
        return self.verify.base_len - self.held(cached) + len(self.verify.draft)

    def held(self, cached: int) -> int:
        """Usable cached tokens: the last committed one is always computed again, for its logits."""
        return min(cached, self.verify.base_len - 1)

    @property
    def length_after(self) -> int:
        """The session's length in the verifier's cache while this round is verified."""
        return self.verify.base_len + len(self.verify.draft)


@dataclass
class InFlight:
    """A batch that was sent and has jobs without a result."""

    batch: Batch
    jobs: dict[str, Pending]
    sent_ms: float
    predicted_ms: float


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

    @property
    def name(self) -> str:
        """The verifier's name."""
        return self.heartbeat.verifier

    @property
    def usable(self) -> bool:
        """Whether new batches may be sent to it."""
        return not self.heartbeat.draining

    @property
    def sessions(self) -> int:
        """Sessions that it holds K/V of or works on."""
        return len(self.cached.keys() | {session for flight in self.in_flight for session in flight.jobs})

    def remaining_ms(self, now_ms: float) -> float:
        """Predicted time until everything sent to it is done."""
        left = 0.0
        for i, flight in enumerate(self.in_flight):
            elapsed = now_ms - flight.sent_ms if i == 0 else 0.0
            left += max(0.0, flight.predicted_ms - elapsed)
        return left
