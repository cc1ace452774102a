"""A session's life as a timeline: what each stretch of it was spent on. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from services.tools.replayer.core.sessions import UNCERTAIN_MS, Life, Round, Sent
from shared.messages import Slo, Status


class Part(StrEnum):
    """What time is spent on, in the order of a round."""

    GATEWAY = "gateway, before the drafter is asked"
    TO_DRAFTER = "to the drafter, and its own work"
    DRAFT = "drafting"
    TO_SCHEDULER = "to the scheduler"
    POOL = "waiting for a batch"
    BEHIND = "waiting behind the verifier's previous batch"
    MODEL = "in the model"
    VERIFIER = "to the verifier, and the commit"
    CLIENT = "from the last result to the end at the gateway"


@dataclass(frozen=True)
class Inversion:
    """Two clocks that disagree: something was received this long before it was sent."""

    sender: str
    receiver: str
    ms: float


@dataclass
class BatchTime:
    """A batch that a round, or a chunk of its prompt, was in. Times in milliseconds since the request."""

    batch: str
    verifier: str
    policy: str
    reason: str
    mates: list[str]
    waiting: int
    predicted_ms: float
    sent_ms: float | None
    result_ms: float | None
    verify_ms: float | None
    behind_ms: float
    behind: str | None
    """The batch that it waited for."""
    slack_ms: float | None
    queue_ms: float
    draft: int
    """Draft tokens that were to be verified."""
    prefill_to: int | None
    new_tokens: int | None


@dataclass
class RoundTime:
    """One round. Times in milliseconds since the request."""

    round: int
    base_len: int
    start_ms: float | None
    total_ms: float | None
    """Until its result was sent; None where it never was, or times are missing."""
    parts: dict[str, float]
    attempts: int
    draft: list[int]
    acceptance: list[float]
    verified: int
    accepted: int
    trimmed: int
    """Draft tokens that the scheduler did not let through."""
    tokens: list[int]
    """What was committed: accepted draft tokens, then the target's own."""
    own: int
    """How many of these are the target's own."""
    status: str
    finish: str | None
    error: str | None
    slack_ms: float | None
    price_ms: float | None
    batches: list[BatchTime]
    left_out: list[tuple[str, str]]
    repeated: int


@dataclass
class Timeline:
    """A session's life."""

    session: str
    gateway: str | None
    drafters: list[str]
    pool: str
    service_class: str
    slo: Slo | None
    started_ms: float | None
    """When the request reached the gateway: milliseconds since 1970."""
    total_ms: float | None
    prompt: list[int] | None
    max_tokens: int | None
    tokens: int
    ending: str
    attained: bool | None
    ttft_ms: float | None
    tpot_ms: float | None
    rounds: list[RoundTime]
    parts: dict[str, float]
    """Where the time went."""
    inversions: list[Inversion]
    notes: list[str] = field(default_factory=list)


Spend = Callable[[Part, float], None]


class _Clock:
    """Differences of times, none of them negative, and the disagreements found on the way."""

    def __init__(self) -> None:
        self.worst: dict[tuple[str, str], float] = {}

    def between(self, sender: str, sent_ms: float | None, receiver: str, received_ms: float | None) -> float:
        """Milliseconds from one to the other; 0 where they are not known, or the clocks disagree."""
        if sent_ms is None or received_ms is None:
            return 0.0
        ms = received_ms - sent_ms
        if ms < -UNCERTAIN_MS and sender != receiver:
            self.worst[sender, receiver] = max(self.worst.get((sender, receiver), 0.0), -ms)
        return max(0.0, ms)


def timeline(life: Life) -> Timeline:
    """The timeline of a session."""
    clock = _Clock()
    start_ms = life.start_ms
    rounds: list[RoundTime] = []
    totals: dict[str, float] = dict.fromkeys((part.value for part in Part), 0.0)
    notes = list(life.notes)
    if life.generate is None:
        notes.append("its beginning is not in the recording")
    else:
        totals[Part.GATEWAY] = life.generate.elapsed_ms
    since_ms, since_name = life.generate_ms, life.generate.gateway if life.generate else ""
    for number in sorted(life.rounds):
        one = life.rounds[number]
        rounds.append(_round(one, since_ms, since_name, start_ms, clock))
        if one.result_ms is not None:
            since_ms = one.result_ms
            since_name = one.result.verifier if one.result else ""
    for told in rounds:
        for name, ms in told.parts.items():
            totals[name] += ms
    if life.ended_ms is not None and rounds:
        gateway = life.generate.gateway if life.generate else "the gateway"
        totals[Part.CLIENT] = clock.between(since_name, since_ms, gateway, life.ended_ms)
    end_ms = life.end_ms
    if any(at is None for one in life.rounds.values() for at in one.sent_ms):
        notes.append("messages of senders that do not say when they sent them: their times are missing")
    ended = life.ended
    return Timeline(
        session=life.session,
        gateway=life.generate.gateway if life.generate else None,
        drafters=list(dict.fromkeys(one.verify.drafter for one in life.rounds.values())),
        pool=life.pool,
        service_class=life.service_class,
        slo=life.slo,
        started_ms=start_ms,
        total_ms=None if start_ms is None or end_ms is None else max(0.0, end_ms - start_ms),
        prompt=life.generate.prompt if life.generate else None,
        max_tokens=life.generate.max_tokens if life.generate else None,
        tokens=len(life.output()),
        ending=_ending(life),
        attained=ended.attained if ended else None,
        ttft_ms=ended.ttft_ms if ended else None,
        tpot_ms=ended.tpot_ms if ended else None,
        rounds=rounds,
        parts={name: ms for name, ms in totals.items() if ms > 0},
        inversions=[Inversion(*names, ms) for names, ms in sorted(clock.worst.items())],
        notes=notes,
    )


def _ending(life: Life) -> str:
    if life.ended is not None:
        cancelled = f" ({life.cancelled.reason})" if life.cancelled else ""
        return life.ended.reason + (f" ({life.ended.code})" if life.ended.code else cancelled)
    if life.cancelled is not None:
        return f"cancelled ({life.cancelled.reason})"
    failed = [one.result.error for one in life.rounds.values() if one.result and one.result.error]
    if failed:
        return f"failed ({failed[-1].code})"
    return str(life.finish) if life.finish else "not ended in the recording"


def _round(one: Round, since_ms: float | None, since: str, start_ms: float | None, clock: _Clock) -> RoundTime:
    verify, result = one.verify, one.result
    parts: dict[str, float] = {}

    def spend(part: Part, ms: float) -> None:
        if ms > 0:
            parts[part.value] = parts.get(part.value, 0.0) + ms

    sent_ms = one.sent_ms[0]
    before_ms = clock.between(since, since_ms, verify.drafter, sent_ms) if since_ms is not None else verify.draft_ms
    drafting_ms = min(verify.draft_ms, before_ms)
    spend(Part.DRAFT, drafting_ms)
    spend(Part.TO_DRAFTER, before_ms - drafting_ms)
    jobs = one.jobs
    if jobs:
        first = jobs[0]
        arrived_ms = None if first.at_ms is None else first.at_ms - first.job.queue_ms
        spend(Part.TO_SCHEDULER, clock.between(verify.drafter, sent_ms, first.scheduler, arrived_ms))
        spend(Part.POOL, first.job.queue_ms)
    told = []
    chunk_ms: float | None = None
    for sent in jobs:
        if chunk_ms is not None:
            spend(Part.POOL, clock.between(sent.verifier, chunk_ms, sent.scheduler, sent.at_ms))
        told.append(_batch(sent, start_ms, clock, spend))
        chunk_ms = sent.result_ms
    end_ms = one.result_ms
    begun_ms = since_ms if since_ms is not None else (None if sent_ms is None else sent_ms - verify.draft_ms)
    committed = result is not None and result.status is Status.COMMITTED
    accepted = result.accepted if result is not None and committed else 0
    verified = result.trimmed_to if result is not None and committed else 0
    tokens = list(result.tokens) if result is not None else []
    last = jobs[-1].job if jobs and jobs[-1].job.prefill_to is None else None
    return RoundTime(
        round=verify.round,
        base_len=verify.base_len,
        start_ms=_since(begun_ms, start_ms),
        total_ms=None if end_ms is None or begun_ms is None else max(0.0, end_ms - begun_ms),
        parts=parts,
        attempts=len(one.sent_ms),
        draft=list(verify.draft),
        acceptance=list(verify.acceptance),
        verified=verified,
        accepted=accepted,
        trimmed=0 if last is None else len(verify.draft) - len(last.draft),
        tokens=tokens,
        own=len(tokens) - accepted,
        status="no result" if result is None else str(result.status),
        finish=None if result is None or result.finish is None else str(result.finish),
        error=result.error.message if result is not None and result.error else None,
        slack_ms=verify.slack_ms,
        price_ms=one.price_ms,
        batches=told,
        left_out=list(one.left_out),
        repeated=one.repeated,
    )


def _batch(sent: Sent, start_ms: float | None, clock: _Clock, spend: Spend) -> BatchTime:
    result = sent.result
    behind_ms = 0.0
    if result is not None:
        span_ms = clock.between(sent.scheduler, sent.at_ms, sent.verifier, sent.result_ms)
        model_ms = min(result.verify_ms, span_ms) if sent.result_ms is not None else result.verify_ms
        if sent.free_ms is not None and sent.at_ms is not None:
            behind_ms = min(max(0.0, sent.free_ms - sent.at_ms), span_ms - model_ms)
        spend(Part.BEHIND, behind_ms)
        spend(Part.MODEL, model_ms)
        spend(Part.VERIFIER, span_ms - model_ms - behind_ms)
    return BatchTime(
        batch=sent.batch,
        verifier=sent.verifier,
        policy=sent.policy,
        reason=sent.job.reason,
        mates=sent.mates,
        waiting=sent.waiting,
        predicted_ms=sent.predicted_ms,
        sent_ms=_since(sent.at_ms, start_ms),
        result_ms=_since(sent.result_ms, start_ms),
        verify_ms=result.verify_ms if result else None,
        behind_ms=behind_ms,
        behind=sent.before if behind_ms > 0 else None,
        slack_ms=sent.job.slack_ms,
        queue_ms=sent.job.queue_ms,
        draft=len(sent.job.draft),
        prefill_to=sent.job.prefill_to,
        new_tokens=result.new_tokens if result else None,
    )


def _since(at_ms: float | None, start_ms: float | None) -> float | None:
    return None if at_ms is None or start_ms is None else max(0.0, at_ms - start_ms)
