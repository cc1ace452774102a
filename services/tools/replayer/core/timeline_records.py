"""Records of a timeline: the phases of a session's time, and the time of its rounds, runs and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from shared.messages import Slo


class Phase(StrEnum):
    """A part of a session's time, in the order of a round."""

    GATEWAY = "gateway, before the drafter is asked"
    TO_DRAFTER = "to the drafter, and its own work"
    DRAFT = "drafting"
    TO_SCHEDULER = "to the scheduler"
    POOL = "waiting for a batch"
    BEHIND = "waiting behind the verifier's previous batch"
    MODEL = "in the model"
    RUN = "decoding in runs"
    VERIFIER = "to the verifier, and the commit"
    CLIENT = "from the last result to the end at the gateway"


@dataclass(frozen=True)
class ClockInversion:
    """Two clocks that disagree: a message was received this long before it was sent."""

    sender: str
    receiver: str
    ms: float


@dataclass
class BatchTime:
    """A batch that verified a round or computed a chunk of its prompt. Times in milliseconds since the request."""

    batch: str
    verifier: str
    policy: str
    reason: str
    mates: list[str]
    """Ids of the other sessions in the batch."""
    waiting: int
    """Pending rounds that were not in the batch."""
    predicted_ms: float
    sent_ms: float | None
    result_ms: float | None
    verify_ms: float | None
    behind_ms: float
    """Time spent behind the verifier's previous batch."""
    behind: str | None
    """Id of that batch, if it delayed this one."""
    slack_ms: float | None
    queue_ms: float
    draft: int
    """Draft tokens to verify."""
    prefill_to: int | None
    new_tokens: int | None


@dataclass
class RoundTime:
    """A round. Times in milliseconds since the request."""

    round: int
    base_len: int
    start_ms: float | None
    total_ms: float | None
    """Until its result was sent; None without a result, or where times are missing."""
    parts: dict[str, float]
    """Time by phase."""
    attempts: int
    draft: list[int]
    acceptance: list[float]
    verified: int
    accepted: int
    trimmed: int
    """Draft tokens that the scheduler cut off."""
    tokens: list[int]
    """Committed tokens: accepted draft tokens, then the target's own."""
    own: int
    """Number of these that are the target's own."""
    status: str
    finish: str | None
    error: str | None
    slack_ms: float | None
    price_ms: float | None
    batches: list[BatchTime]
    left_out: list[tuple[str, str]]
    """Batches sent without this round while it was pending, each with the reason."""
    repeated: int
    """Number of further results."""


@dataclass
class RunReportTime:
    """A report of a run: what its verifier has decoded since the last one."""

    at_ms: float | None
    """When it was sent, in milliseconds since the request."""
    tokens: int
    copied: list[int]
    """Places of accepted copies among its tokens."""
    verify_ms: float
    """Time of its steps in the model."""

    @property
    def steps(self) -> int:
        """Number of its steps: each brings one token of the target's own."""
        return self.tokens - len(self.copied)


@dataclass
class RunTime:
    """A run: tokens that the verifier decoded by itself. Times in milliseconds since the request."""

    after: int
    """Number of the round that it followed."""
    base_len: int
    start_ms: float | None
    total_ms: float | None
    """From the result of that round to the last report; None where times are missing."""
    verifier: str
    tokens: list[int]
    verify_ms: float
    """Time of its steps in the model."""
    reports: list[RunReportTime]
    finish: str | None

    @property
    def steps(self) -> int:
        """Number of its steps."""
        return sum(report.steps for report in self.reports)


@dataclass
class Timeline:
    """A session's rounds and times. The fields are the keys of `wisp replay --json`."""

    session: str
    gateway: str | None
    drafters: list[str]
    pool: str
    service_class: str
    slo: Slo | None
    started_ms: float | None
    """Arrival of the request at the gateway, in milliseconds since 1970."""
    total_ms: float | None
    prompt: list[int] | None
    max_tokens: int | None
    tokens: int
    ending: str
    attained: bool | None
    ttft_ms: float | None
    tpot_ms: float | None
    rounds: list[RoundTime]
    runs: list[RunTime]
    parts: dict[str, float]
    """Time by phase."""
    inversions: list[ClockInversion]
    notes: list[str] = field(default_factory=list)
