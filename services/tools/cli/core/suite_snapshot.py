"""What `wisp top` shows at one moment; with `--json`, these fields are the JSON. Nothing but data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Tokens per second over the last 10 and 60 seconds, or as much of these as was observed."""

    short: float
    long: float


@dataclass(frozen=True)
class SchedulerView:
    """The last `Load` of the active scheduler."""

    name: str
    silent_ms: float
    """Time since it."""
    alive: bool
    policy: str
    verifiers: int
    utilization: float
    price_ms: float
    """What verifying one more token costs the others."""
    pending: int
    queue_ms: float
    backlog_ms: float
    draft_cap: int
    tokens_per_round: float


@dataclass(frozen=True)
class VerifierView:
    """A verifier heard of in the last minute. Rates are of the last 10 s, means and medians of the last minute."""

    name: str
    alive: bool
    silent_ms: float
    """Time since its last heartbeat."""
    draining: bool
    cache_used: float
    """Share of the K/V budget."""
    cache_tokens: int
    sessions: int
    """Sessions whose K/V it holds."""
    jobs_per_s: float
    batch_jobs: float | None
    """Mean number of jobs in a batch."""
    predicted_ms: float | None
    """Of the last batch that was answered."""
    measured_ms: float | None
    ratio_p50: float | None
    """Median of measured / predicted time."""
    samples: int | None
    """Batches that its cost model was fitted to; None until the estimator has spoken."""


@dataclass(frozen=True)
class ClassView:
    """A service class: what is under way, and what ended in the last minute."""

    service_class: str
    sessions: int
    waiting: int
    """Rounds that wait for a batch."""
    queue_ms: float | None
    slack_ms: float | None
    """Least slack among those that wait; None where none has an SLO."""
    ended: int
    """Texts that ended, without those refused or given up by their clients."""
    attained: int
    """How many of these came to their own end within their SLO."""
    attainment: float | None
    refused: int


@dataclass(frozen=True)
class EndView:
    """How often texts of a class ended for a reason in the last minute."""

    service_class: str
    reason: str
    """With a refusal's code after it."""
    count: int


@dataclass(frozen=True)
class JobView:
    """One job of a batch, and why it is in it."""

    session: str
    round: int
    service_class: str
    prefill_to: int | None
    """Set for a chunk of a prompt: the length that it brings the cache to."""
    draft: int
    """Draft tokens to be verified."""
    drafted: int
    """Draft tokens before trimming."""
    queue_ms: float
    slack_ms: float | None
    reason: str


@dataclass(frozen=True)
class BatchView:
    """A batch that was sent."""

    batch: str
    verifier: str | None
    """None until it has answered."""
    age_ms: float
    policy: str
    predicted_ms: float
    measured_ms: float | None
    jobs: list[JobView]
    waiting: int
    """Rounds for the same verifier that were left out."""
    left_out: list[tuple[str, str]]
    """The first of these: session, and why."""


@dataclass(frozen=True)
class SuiteSnapshot:
    """A moment of a suite, as far as it was observed."""

    observed_ms: float
    scheduler: SchedulerView | None
    verifiers: list[VerifierView]
    classes: list[ClassView]
    throughput: Rates
    """Committed tokens."""
    goodput: Rates
    """Tokens of texts that attained their SLO, counted when the text ends."""
    verified: int
    """Draft tokens verified in the last minute."""
    accepted: int
    acceptance: float | None
    ends: list[EndView]
    batches: list[BatchView]
    """The latest first."""

    @property
    def empty(self) -> bool:
        """Whether nothing of a suite was seen."""
        return self.scheduler is None and not self.verifiers
