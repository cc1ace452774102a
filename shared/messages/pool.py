"""Messages about the services and their load: heartbeats, measurements, cost models and prices."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from shared.messages.fields import (
    FARTHEST_MS,
    LONGEST_MS,
    Arithmetic,
    Count,
    Length,
    Message,
    Milliseconds,
    Name,
    Probability,
    Ratio,
    Record,
    SignedMilliseconds,
)

SILENT_MS = 2000
"""A verifier without a heartbeat for this long counts as gone: its lease expires and its rounds go to others. It is
four times the usual interval between heartbeats."""

DRAFTER_BEAT_S = 1.0
"""Time between two heartbeats of a drafter."""


class BatchShape(Record):
    """Size of a batch: the inputs of the cost model."""

    jobs: Count
    new_tokens: Count
    new_context: Count
    """Σ over jobs of new tokens × the session's length after them."""
    context: Count
    """Σ over jobs of the session's length after the batch."""
    rows: Count = 0
    """Positions with computed logits: the draft and one more for a round, none for a chunk of prefill."""


class Measurement(Record):
    """Measured time of one batch in the model."""

    shape: BatchShape
    measured_ms: Annotated[Milliseconds, Field(le=LONGEST_MS)]


class Sample(Message):
    """verifier → estimator: the batches measured since the last sample.

    Sent with the heartbeats and not after each batch, when the next round needs every core.
    """

    verifier: Name
    batches: Annotated[list[Measurement], Field(min_length=1)]
    profile: bool = False
    """True for the batches that a verifier runs at its start to profile itself."""


class CostModel(Message):
    """estimator → scheduler, gateway: the cost model of one verifier. See `shared.cost.model`."""

    verifier: Name
    coefficients: Annotated[list[Annotated[float, Field(ge=0, le=FARTHEST_MS)]], Field(min_length=5, max_length=7)]
    """Milliseconds per batch, job, later new token, million new × context, million context, row of logits, first new
    token. With five coefficients all new tokens cost the same, and rows cost nothing."""
    ratio_p50: Ratio
    """Median, 90th and 99th percentile of measured / predicted time."""
    ratio_p90: Ratio
    ratio_p99: Ratio
    samples: Count
    version: Count
    knee: Length = 8
    """New tokens of a batch that count as its first."""

    @field_validator("coefficients")
    @classmethod
    def _whole(cls, value: list[float]) -> list[float]:
        rows = value[5:6] or [0.0]
        first = value[6:7] or value[2:3]
        return [*value[:5], *rows, *first]


class ClassLoad(Record):
    """Rounds and sessions of one service class, as the scheduler sees them."""

    service_class: Name
    sessions: Count
    """Running sessions."""
    waiting: Count
    """Pending rounds."""
    queue_ms: Milliseconds
    """Recent time from a round's arrival to its batch; 0 when no round was sent lately."""
    slack_ms: SignedMilliseconds | None = None
    """Least slack of the pending rounds; None without SLOs."""


class Load(Message):
    """scheduler → drafters, gateway: load of the verifiers.

    Times are predictions of the cost model, averaged over the usable verifiers.
    """

    scheduler: Name
    price_ms: Milliseconds
    """Cost of verifying one more token for the other rounds, in milliseconds of batch time; 0 when there is room."""
    queue_ms: Milliseconds
    """Recent time from a round's arrival to its batch; 0 when no round was sent lately."""
    pending: Count
    without_room: Count = 0
    """Sessions that wait for room in the verifiers' KV caches; 0 from a scheduler of a version without it."""
    draft_cap: Count
    """Longest draft worth sending now."""
    mixed_arithmetic: bool = False
    """True if a session may continue in another arithmetic when no verifier has its own."""
    policy: str = ""
    first_come: bool = False
    """True if the policy takes rounds in order of arrival, so that a round waits for all that came before it."""
    verifiers: Count = 0
    """Usable verifiers."""
    utilization: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Share of the verifiers' time that the SLOs of the running sessions need; 1 is all of it.

    For each verifier: `fixed_ms` / the shortest time between batches that its sessions need, plus each session's own
    share of the time (`shared.slo.step_need`).
    """
    demand: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Share of what the verifiers can compute in time that the running sessions and the prompts need; 1 is all of it.

    Unlike `utilization`, it leaves out the fixed time of a batch, which more verifiers do not shorten. 0 from a
    scheduler of a version without it.
    """
    room_tokens_per_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Tokens per millisecond that a verifier computes in steps that keep its sessions' promises, where loading the
    weights hides the arithmetic of a step's first tokens (an accelerator). None elsewhere, and from a scheduler of a
    version without it.

    Steps of an accelerator take most of the promised time however few sessions there are, so `utilization` says nothing
    about room for more of them there, and `demand` counts instead.
    """
    fixed_ms: Milliseconds = 0.0
    """Time of a batch apart from its rounds' own time."""
    period_ms: Milliseconds | None = None
    """The shortest time between batches that a running session needs; None without SLOs."""
    away_ms: Milliseconds = 0.0
    """Part of a round's time outside queue and batch: drafting and messages."""
    round_ms: Milliseconds = 0.0
    """A round's own time in a batch: the time that one more session adds to each batch."""
    run_own_ms: Milliseconds | None = None
    """Time that a session in a run adds to each step; None without runs, and from a scheduler of an earlier version."""
    tokens_per_round: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Cautious estimate for a new session: the mean of all rounds, less the mean deviation of the sessions' own means
    from it."""
    prefill_ms: Milliseconds = 0.0
    """Time per token of a prompt."""
    verify_ms: list[Milliseconds] = Field(default_factory=list)
    """Time of a batch in which a round verifies 0, 1, 2, … draft tokens beside the usual number of other rounds; empty
    from a scheduler of a version without it, or without usable verifiers."""
    run_ms: Milliseconds | None = None
    """Time per token of a session that a verifier decodes in a run beside its other sessions; None without runs."""
    runs_copy: bool = False
    """True if runs use prompt lookup where a session asks for it."""
    backlog_ms: Milliseconds = 0.0
    """Time to finish all pending and running rounds: the wait of a round that arrives now, behind all others."""
    classes: list[ClassLoad] = Field(default_factory=list)
    without_drafters: list[Name] = Field(default_factory=list)
    """Pools without a live drafter, whose requests schedulers serve by plain decoding."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_scheduler(cls, fields: Any) -> Any:
        """Derive `first_come` as readers did before schedulers sent it, for the time of a rolling update."""
        if isinstance(fields, dict) and "first_come" not in fields:
            return {**fields, "first_come": fields.get("policy") in ("sled", "fcfs")}
        return fields


class Residency(Record):
    """Tokens of one session whose KV a verifier holds."""

    session: Name
    cached: Count


class Heartbeat(Message):
    """verifier → scheduler: sign of life, with the state of the KV cache."""

    verifier: Name
    fingerprint: str
    max_len: Count
    """The model's context, or the whole KV budget if that is smaller, in tokens."""
    free_tokens: Count
    total_tokens: Count
    lease: Count = 0
    """See `shared.state.registry`; 0 before the first lease."""
    draining: bool = False
    arithmetic: Arithmetic = ""
    features: list[Name] = Field(default_factory=list)
    """Features that sessions may need; see `shared.messages.needing`."""
    residency: list[Residency] = Field(default_factory=list)


class LearningState(Record):
    """A draft that learns: its last comparison with the shipped weights, on texts held back from learning."""

    version: Count
    """Changes of the weights in use since the shipped ones."""
    acceptance: Probability
    """Share of first draft tokens accepted."""
    shipped_acceptance: Probability
    """The same with the shipped weights."""


class DrafterHeartbeat(Message):
    """drafter → schedulers, observers: sign of life. A scheduler that serves a pool without drafters sends it too."""

    drafter: Name
    pool: Name
    sessions: Count
    """Sessions being served."""
    max_sessions: Count
    """Most sessions served at once."""
    drafts: bool = True
    """False if it never drafts: it stands in for drafters, and gives its sessions to one that has room."""
    learning: LearningState | None = None
    """None if its draft has not learned."""
