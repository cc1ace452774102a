"""The state of a suite at one moment; `wisp top --json` prints these fields."""

from __future__ import annotations

from dataclasses import dataclass

from shared.arithmetic import distinct


@dataclass(frozen=True)
class Rates:
    """Tokens per second over the last 10 and 60 seconds, or over the observed part of them."""

    short: float
    long: float


@dataclass(frozen=True)
class SchedulerView:
    """The latest `Load` of the active scheduler."""

    name: str
    silent_ms: float
    """Time since that message."""
    alive: bool
    policy: str
    verifiers: int
    utilization: float
    price_ms: float
    """Delay that verifying one more token causes to the other rounds."""
    pending: int
    queue_ms: float
    backlog_ms: float
    draft_cap: int
    tokens_per_round: float


@dataclass(frozen=True)
class VerifierView:
    """A verifier with a heartbeat in the last minute. Rates cover the last 10 s, means and medians the last minute."""

    name: str
    alive: bool
    silent_ms: float
    """Time since its last heartbeat."""
    draining: bool
    arithmetic: str
    """Of its logits: see `shared.arithmetic`; empty if unknown."""
    cache_used: float
    """Share of the KV budget."""
    cache_tokens: int
    sessions: int
    """Sessions whose KV it holds."""
    runs: int
    """Sessions that it decodes in runs."""
    busy: float
    """Share of its time in steps of which a result has come."""
    jobs_per_s: float
    """Jobs of batches, and tokens of runs: each is a job of its step."""
    batch_jobs: float | None
    """Mean number of jobs in a batch and of runs beside it."""
    predicted_ms: float | None
    """Predicted time of the latest batch with results."""
    measured_ms: float | None
    ratio_p50: float | None
    """Median of measured / predicted time."""
    samples: int | None
    """Batches behind its cost model; None until the estimator has published one."""


@dataclass(frozen=True)
class PoolView:
    """A pool of drafters with a heartbeat in the last seconds."""

    pool: str
    drafters: int
    sessions: int
    """Sessions of its drafters."""
    undrafted: int
    """Sessions that schedulers decode without drafts, because no drafter has room for them."""
    learned: int = 0
    """Drafters whose draft has taken learned weights."""
    learned_acceptance: float | None = None
    """Mean acceptance of first draft tokens on the texts that learning drafters hold back; None if there are none."""
    shipped_acceptance: float | None = None
    """The same with the shipped weights."""


@dataclass(frozen=True)
class ClassView:
    """A service class: running sessions, and sessions that ended in the last minute."""

    service_class: str
    sessions: int
    waiting: int
    """Pending rounds."""
    queue_ms: float | None
    slack_ms: float | None
    """Least slack of the pending rounds; None if none has an SLO."""
    ended: int
    """Ended sessions, without refused ones and those aborted by their clients."""
    promised: int
    """Ended sessions that had an SLO; the others were best effort."""
    attained: int
    """Sessions that finished within their SLO."""
    attainment: float | None
    """Share of the sessions with an SLO that attained it; None if there was none."""
    refused: int


@dataclass(frozen=True)
class EndView:
    """Number of sessions of a class that ended for one reason in the last minute."""

    service_class: str
    reason: str
    """A refusal's code follows it."""
    count: int


@dataclass(frozen=True)
class JobView:
    """One job of a batch and the reason for its choice."""

    session: str
    round: int
    service_class: str
    prefill_to: int | None
    """Set for a chunk of a prompt: the cached length after it."""
    draft: int
    """Draft tokens to verify."""
    drafted: int
    """Draft tokens before trimming."""
    queue_ms: float
    slack_ms: float | None
    reason: str


@dataclass(frozen=True)
class BatchView:
    """A batch that the scheduler sent."""

    batch: str
    verifier: str | None
    """None until its results arrive."""
    age_ms: float
    policy: str
    predicted_ms: float
    measured_ms: float | None
    runs: int
    """Sessions in runs on that verifier when its first result came."""
    jobs: list[JobView]
    waiting: int
    """Rounds left in the queue."""
    left_out: list[tuple[str, str]]
    """Session and reason of the first of them."""


@dataclass(frozen=True)
class SuiteSnapshot:
    """The observed state of a suite."""

    observed_ms: float
    scheduler: SchedulerView | None
    verifiers: list[VerifierView]
    pools: list[PoolView]
    classes: list[ClassView]
    throughput: Rates
    """Committed tokens."""
    goodput: Rates
    """Estimated tokens per second of sessions that attain their SLO: `throughput` times the share of such sessions in
    the tokens of all ended sessions."""
    run_tokens: int
    """Tokens that were decoded in runs in the last minute."""
    verified: int
    """Draft tokens verified in the last minute."""
    accepted: int
    acceptance: float | None
    ends: list[EndView]
    batches: list[BatchView]
    """The latest batch first."""

    @property
    def mixture(self) -> dict[str, list[str]]:
        """Names of the live verifiers by arithmetic if there are several; else empty."""
        live = [one for one in self.verifiers if one.alive]
        known = distinct(one.arithmetic for one in live)
        if len(known) < 2:
            return {}
        return {arithmetic: [one.name for one in live if one.arithmetic == arithmetic] for arithmetic in known}

    @property
    def without_drafters(self) -> list[str]:
        """Names of the pools that schedulers serve without drafters."""
        return [one.pool for one in self.pools if not one.drafters]

    @property
    def empty(self) -> bool:
        """True if no message of a suite was observed."""
        return self.scheduler is None and not self.verifiers
