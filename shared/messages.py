"""Messages between the services: small typed records, msgpack maps on the wire.

A map carries its type name (`t`) and the schema version (`v`) beside the record's own fields. Unknown fields
are ignored, so that services of neighbouring versions work side by side during a rolling update; a missing or ill-typed
field is a `MessageError`. Times are durations in milliseconds, left or elapsed, never a point on another process's
clock.

Token positions count from the first token of the prompt. `base_len` is always the number of committed tokens (prompt
included) that a round builds on.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from shared.errors import MessageError

SCHEMA_VERSION = 1

SILENT_MS = 2000
"""A verifier without a heartbeat for this long counts as gone: its lease expires and its rounds go to others. It is
four times the usual interval between heartbeats."""

DRAFTER_BEAT_S = 1.0
"""Time between two heartbeats of a drafter."""

DEFAULT_CLASS = "default"
"""Service class of requests without one."""

LONGEST_DRAFT = 1024
"""Longest draft of a round, in tokens: above what any drafter sends."""

MOST = 2**53
"""Largest count. Together with the limits of times it keeps every number computed from a message finite."""
SHORTEST_MS, LONGEST_MS = 1e-9, 1e9
"""Limits of SLO times: up to eleven days."""
FARTHEST_MS = 1e20
"""Largest distance of a deadline from now: beyond that of the last of 2**31 tokens."""

Count = Annotated[int, Field(ge=0, le=MOST)]
Length = Annotated[int, Field(ge=1, le=MOST)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Promised = Annotated[float, Field(ge=SHORTEST_MS, le=LONGEST_MS)]
Slack = Annotated[float, Field(ge=-FARTHEST_MS, le=FARTHEST_MS)]
SignedMilliseconds = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
SessionKey = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]*$")]
"""HMAC proving that the sender was given this session (`shared.broker.session_keys`); empty where none is required."""
Arithmetic = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Name of the arithmetic behind a verifier's logits (`shared.arithmetic`); empty if unknown."""
Ratio = Annotated[float, Field(gt=0, le=MOST)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Record(BaseModel):
    """A part of a message: strictly typed and immutable; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Message(Record):
    """A record that is sent by itself."""

    type_name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.type_name = cls.__name__


class Sampling(Record):
    """Sampling parameters of the target. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 restrict nothing."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0


class Slo(Record):
    """A promised speed: time to first token, and mean time per output token after it, in milliseconds."""

    ttft_ms: Promised
    tpot_ms: Promised


class HiddenFormat(StrEnum):
    """Format of hidden states in messages; see `shared.models.hidden_states`."""

    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    """With one float32 scale per row."""

    @property
    def width(self) -> int:
        """Bytes per element."""
        return 2 if self is HiddenFormat.BFLOAT16 else 1


class Finish(StrEnum):
    """The reason why a completion ended, decided with the commit."""

    STOP = "stop"
    LENGTH = "length"


class Status(StrEnum):
    """Outcome of one job."""

    COMMITTED = "committed"
    """The round's tokens are committed, now or by an earlier copy of the round."""
    CONFLICT = "conflict"
    """The round did not build on the committed length; `tokens` are the committed ones from `base_len` on."""
    PREFILLED = "prefilled"
    """A chunk of the prompt is in the verifier's KV cache; nothing was sampled."""
    FAILED = "failed"
    """The round cannot be verified, now or later; `error` gives the reason."""


class Generate(Message):
    """gateway → drafter: draft for this session until it ends."""

    session: Name
    gateway: Name
    prompt: Annotated[list[TokenId], Field(min_length=1)]
    sampling: Sampling
    stop_ids: list[TokenId]
    max_tokens: Length
    fingerprint: str
    vocab_fingerprint: str
    slo: Slo | None = None
    service_class: Name = DEFAULT_CLASS
    draft: Name = "auto"
    """The requested draft source, by its name in the drafter's registry; `auto` leaves the choice to the drafter."""
    elapsed_ms: Milliseconds = 0.0
    """Time since the request reached the gateway."""
    session_key: SessionKey = ""


class RoundFields(Record):
    """Fields of a round that the scheduler passes on from `Verify` to `Job`."""

    session: Name
    round: Count
    base_len: Length
    draft: list[TokenId]
    drafter: Name
    gateway: Name
    fingerprint: str
    slack_ms: SignedMilliseconds | None = None
    """Time left until the session's next token is due; negative when late, None without an SLO."""
    tpot_ms: Promised | None = None
    """Time per output token that the session was promised; None without an SLO."""
    service_class: Name = DEFAULT_CLASS
    draft_ms: Milliseconds = 0.0
    session_key: SessionKey = ""
    hidden_from: Count | None = None
    """First position of the committed tokens whose final hidden states the drafter wants; None for none."""
    hidden_format: Annotated[HiddenFormat, Field(strict=False)] = HiddenFormat.BFLOAT16


class Verify(RoundFields, Message):
    """drafter → scheduler: verify this draft. An empty draft asks for plain decoding."""

    draft: Annotated[list[TokenId], Field(max_length=LONGEST_DRAFT)]
    acceptance: Annotated[list[Probability], Field(max_length=LONGEST_DRAFT)]
    """Predicted probability of each draft token, given that those before it are accepted."""
    slack_ms: Slack | None = None
    """See `RoundFields`; bounded, because a deadline is computed from it."""
    attempt: Count = 0
    committed_in: list[Arithmetic] = Field(default_factory=list)
    """Arithmetics in which the session's tokens were committed, as far as the drafter has learned them from results."""
    run_tokens: Count = 0
    """Tokens that the drafter leaves to the verifier after this round: it expects drafts not to pay for so long."""


class RunGrant(Record):
    """Permission to decode a session in a run: token by token, without further rounds, until either limit."""

    tokens: Length
    ms: Promised


class Job(RoundFields):
    """One session's part of a batch. Its draft is trimmed to what is to be verified."""

    drafted: Count
    """Length of the draft before trimming."""
    prefill_to: Count | None = None
    """Only extend the cache to this length (a chunk of a long prompt) and sample nothing."""
    queue_ms: Milliseconds = 0.0
    """Time since the scheduler received the round."""
    reason: str = ""
    """Why the policy put this job into this batch."""
    run: RunGrant | None = None
    """Go on after this round in a run; None for a round only."""

    @classmethod
    def of(
        cls,
        verify: Verify,
        *,
        draft: int,
        prefill_to: int | None,
        queue_ms: float,
        slack_ms: float | None,
        reason: str,
        run: RunGrant | None = None,
    ) -> Job:
        """Return the job for the first `draft` draft tokens of a round, or for a chunk of its prompt.

        A chunk of a prompt asks for no hidden states.
        """
        passed_on = {name: getattr(verify, name) for name in RoundFields.model_fields}
        changed = {
            "draft": verify.draft[:draft],
            "slack_ms": slack_ms,
            "hidden_from": verify.hidden_from if prefill_to is None else None,
        }
        own = {
            "drafted": len(verify.draft),
            "prefill_to": prefill_to,
            "queue_ms": queue_ms,
            "reason": reason,
            "run": run,
        }
        return cls(**{**passed_on, **changed, **own})


class LeftOut(Record):
    """A pending round that a batch leaves out, and the reason."""

    session: Name
    reason: str


class Batch(Message):
    """scheduler → one verifier: verify these together."""

    batch: Name
    scheduler: Name
    lease: Count = 0
    """The verifier's lease from its last heartbeat. Under another lease the verifier neither commits nor replies; 0
    comes from a scheduler of a version without leases."""
    jobs: Annotated[list[Job], Field(min_length=1)]
    predicted_ms: Milliseconds
    policy: str
    waiting: Count = 0
    """Pending rounds for this verifier that are not in the batch."""
    left_out: list[LeftOut] = Field(default_factory=list)
    """The first of these rounds, in the policy's order."""


class Release(Message):
    """scheduler → one verifier: these sessions have moved to another verifier, so drop their KV."""

    sessions: Annotated[list[Name], Field(min_length=1)]


class Halt(Message):
    """scheduler → one verifier: end the runs of these sessions with the step in progress."""

    sessions: Annotated[list[Name], Field(min_length=1)]


class Failure(Record):
    """The error that ends a session, as in the HTTP API's error body."""

    code: str
    message: str


class Result(Message):
    """verifier → drafter, gateway, scheduler, journal: the outcome of one job."""

    session: Name
    round: Count
    base_len: Length
    status: Annotated[Status, Field(strict=False)]
    verifier: Name
    batch: Name
    accepted: Count = 0
    """Accepted draft tokens. The bonus token follows them."""
    tokens: list[TokenId] = Field(default_factory=list)
    """Committed tokens from `base_len` on: the accepted draft tokens and the bonus token, or the tokens of a run."""
    run: bool = False
    """True if the tokens were decoded in a run, each in a step of its own, since the session's last result."""
    run_left: Count = 0
    """Tokens that the verifier may still decode in the session's run; 0 if the next token needs a round."""
    drafted: Count = 0
    trimmed_to: Count = 0
    """Number of verified draft tokens."""
    finish: Annotated[Finish | None, Field(strict=False)] = None
    cached: Count = 0
    """Tokens of the session whose KV this verifier now holds."""
    new_tokens: Count = 0
    """Tokens computed for this job."""
    draft_ms: Milliseconds = 0.0
    queue_ms: Milliseconds = 0.0
    verify_ms: Milliseconds = 0.0
    error: Failure | None = None
    logits_digest: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """Digest of the bits of the logits behind the choices, row after row; None unless the journal is on."""
    arithmetic: Arithmetic = ""
    """Arithmetic of the verifier."""
    committed_in: list[Arithmetic] = Field(default_factory=list)
    """Arithmetics in which the session's tokens were committed so far, whichever verifiers did it, in the order of
    their first commit."""


class HiddenStates(Message):
    """verifier → one drafter, before the Result: the target's final hidden states of committed tokens.

    Row i belongs to position `start + i`; the row of the last committed token comes with the next round. A long run is
    split into several messages. The bytes are packed by `shared.models.hidden_states`.
    """

    session: Name
    round: Count
    start: Count
    count: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=1)]
    """Elements per row: the target's hidden size."""
    format: Annotated[HiddenFormat, Field(strict=False)] = HiddenFormat.BFLOAT16
    rows: bytes
    """(count, size) elements, little-endian, row after row."""
    scales: Annotated[bytes, Field(validate_default=True)] = b""
    """(count) little-endian float32 for int8: the value of an element of 1 in each row. Otherwise empty."""

    @field_validator("rows", "scales")
    @classmethod
    def _complete(cls, value: bytes, info: ValidationInfo) -> bytes:
        others = info.data
        if not {"count", "size", "format"} <= others.keys():
            return value  # one of these is invalid and reported by itself
        count, size, form = others["count"], others["size"], others["format"]
        if info.field_name == "rows":
            expected = count * size * form.width
        else:
            expected = count * 4 if form is HiddenFormat.INT8 else 0
        if len(value) != expected:
            raise ValueError(f"{len(value)} bytes, but {count} rows of {size} in {form} need {expected}")
        return value


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
    """Recent time from a round's arrival to its batch."""
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
    """Recent time from a round's arrival to its batch."""
    pending: Count
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

    For each verifier: `fixed_ms` / the shortest time between batches that its sessions need, plus, for each session,
    its round's own time / the time between its rounds; a session needs a round every `tpot_ms` x tokens per round, and
    `shared.slo.batch_period_ms` gives the time between batches that allows it.
    """
    fixed_ms: Milliseconds = 0.0
    """Time of a batch apart from its rounds' own time."""
    period_ms: Milliseconds | None = None
    """The shortest time between batches that a running session needs; None without SLOs."""
    away_ms: Milliseconds = 0.0
    """Part of a round's time outside queue and batch: drafting and messages."""
    round_ms: Milliseconds = 0.0
    """A round's own time in a batch: the time that one more session adds to each batch."""
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


class Cancel(Message):
    """gateway → all: drop this session. Redis holds the cancellation durably."""

    session: Name
    reason: str


class Ended(Message):
    """gateway → observers: a completion has ended, or a request was refused. No service depends on it."""

    session: Name
    service_class: Name = DEFAULT_CLASS
    slo: Slo | None = None
    reason: str
    """As in the gateway's metrics (`stop`, `length`, `abort`, `error`), or `refused`."""
    code: str = ""
    """Reason of the refusal, as in the response header `x-wisp-refused`."""
    prompt_tokens: Count = 0
    tokens: Count = 0
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    """Mean time per output token after the first; None for a completion of one token."""
    attained: bool = False
    """True if the completion ended by itself within its SLO; true for every complete one without an SLO."""


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
    residency: list[Residency] = Field(default_factory=list)


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


MESSAGES: dict[str, type[Message]] = {
    kind.type_name: kind
    for kind in (
        Generate,
        Verify,
        Batch,
        Release,
        Halt,
        Result,
        HiddenStates,
        Sample,
        CostModel,
        Load,
        Cancel,
        Ended,
        Heartbeat,
        DrafterHeartbeat,
    )
}


def encode(message: Message) -> bytes:
    """Return the message as bytes for the wire."""
    fields = message.model_dump(exclude_defaults=True)
    fields["t"] = message.type_name
    fields["v"] = SCHEMA_VERSION
    return msgpack.packb(fields)  # type: ignore[no-any-return]


def decode(body: bytes) -> Message:
    """Return the message in these bytes.

    Raises MessageError when they are not msgpack, no known message, or a field is missing or ill-typed.
    """
    try:
        fields = msgpack.unpackb(body)
    except Exception as error:  # msgpack raises half a dozen unrelated types, ValueError and its own among them
        raise MessageError(f"not msgpack: {error or type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise MessageError(f"expected a msgpack map, got {type(fields).__name__}")
    name = fields.pop("t", None)
    kind = MESSAGES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MessageError(f"unknown message type {name!r}; known: {', '.join(MESSAGES)}")
    version = fields.pop("v", None)
    if not isinstance(version, int) or version < 1:
        raise MessageError(f"{name}: schema version {version!r} is not a positive integer")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg']}" for e in error.errors()[:5])
        raise MessageError(f"{name}: {problems}") from error
