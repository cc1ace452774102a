"""Messages that follow a request: its rounds, their results and its end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from shared.messages.fields import (
    DEFAULT_CLASS,
    Arithmetic,
    Count,
    Finish,
    HiddenFormat,
    Length,
    Message,
    Milliseconds,
    Name,
    Probability,
    Promised,
    Record,
    Sampling,
    SessionKey,
    SignedMilliseconds,
    Slack,
    Slo,
    Status,
    TokenId,
)

LONGEST_DRAFT = 1024
"""Longest draft of a round, in tokens: above what any drafter sends."""


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
    prediction: list[TokenId] = Field(default_factory=list)
    """The output that the client expects, from which drafts may copy; empty if it expects nothing."""
    elapsed_ms: Milliseconds = 0.0
    """Time since the request reached the gateway."""
    session_key: SessionKey = ""
    trace: bool = False
    """True if the request asked for a trace: its rounds name the sources of their drafts."""
    grouped: bool = False
    """True if the gateway reads groups of results (`shared.messages.wire`)."""


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
    sources: Annotated[list[Name], Field(max_length=LONGEST_DRAFT)] = Field(default_factory=list)
    """Source of each draft token; empty unless the request asked for a trace."""
    grouped: bool = False
    """True if gateway, drafter and scheduler read groups of results (`shared.messages.wire`). A service of a version
    without groups drops it."""


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
    """Tokens that the verifier may decode in a run after this round: the drafter expects no gain from drafts."""
    run_copies: Annotated[int, Field(ge=0, le=LONGEST_DRAFT)] = 0
    """Most draft tokens of a step by prompt lookup in a run of this session; 0: none."""


class RunGrant(Record):
    """Permission to decode a session in a run, step by step without further rounds, until either limit."""

    tokens: Length
    ms: Promised
    copies: Annotated[int, Field(ge=0, le=LONGEST_DRAFT)] = 0
    """Most draft tokens of a step, which the verifier copies from the session's text; 0: each step gives one token."""


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
            "sources": verify.sources[:draft],
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
    """True if the tokens were decoded in a run since the session's last result."""
    copied: list[Count] = Field(default_factory=list)
    """Indices into `tokens` of a run's accepted copies; each other token took a step."""
    run_left: Count = 0
    """Tokens that the verifier may still decode in the session's run; 0 if the next token needs a round."""
    drafted: Count = 0
    trimmed_to: Count = 0
    """Number of verified draft tokens; those of a run are copies."""
    finish: Annotated[Finish | None, Field(strict=False)] = None
    cached: Count = 0
    """Tokens of the session whose KV this verifier now holds."""
    new_tokens: Count = 0
    """Tokens computed for this job."""
    draft_ms: Milliseconds = 0.0
    queue_ms: Milliseconds = 0.0
    verify_ms: Milliseconds = 0.0
    predicted_ms: Milliseconds = 0.0
    """Time that the scheduler predicted for the batch; 0 for a run, and from a verifier of a version without it."""
    error: Failure | None = None
    logits_digest: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """Digest of the bits of the logits behind the choices, row after row; None unless the journal is on."""
    arithmetic: Arithmetic = ""
    """Arithmetic of the verifier."""
    committed_in: list[Arithmetic] = Field(default_factory=list)
    """Arithmetics in which the session's tokens were committed so far, whichever verifiers did it, in the order of
    their first commit."""
    sources: list[Name] = Field(default_factory=list)
    """Source of each draft token of the round; empty unless the request asked for a trace."""
    logprobs: str = ""
    """Records of the log-probabilities that the session asks for, in base64; see `shared.messages.logprobs`. Empty also
    where the tokens were committed by another result."""
    logprobs_from: Count = 0
    """Position of the first record's token."""

    @property
    def accepted_drafts(self) -> int:
        """Accepted draft tokens of a round, or accepted copies of a run."""
        return len(self.copied) if self.run else self.accepted

    @property
    def run_steps(self) -> int:
        """Steps of the model that brought the tokens of a run, at least 1: each token but the copies took one."""
        return max(1, len(self.tokens) - len(self.copied))


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
