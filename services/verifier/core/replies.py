"""The result of a job, from what the model and the commit script said. Pure."""

from __future__ import annotations

from typing import Any

from services.verifier.core.tasks import VerifyOutcome
from shared.errors import TooLong
from shared.messages import Failure, HiddenStates, Job, Result, Status
from shared.state.commits import CommitOutcome, Committed

GONE = Failure(
    code="session_gone",
    message="the session's state is not in Redis any more (expired, or the data was lost); send the request again",
)
FORBIDDEN = Failure(code="forbidden", message="the job does not show its session's key")
CANCELLED = Failure(code="cancelled", message="the session was cancelled")


def wrong_model(job: Job, fingerprint: str) -> Failure:
    """The session was meant for another model than this verifier's."""
    return Failure(
        code="wrong_model",
        message=f"the session is for model {job.fingerprint}, this verifier serves {fingerprint}; "
        "use the same model folder and dtype for gateway and verifiers",
    )


def refused(error: Exception) -> Failure:
    """The model cannot take this job."""
    if isinstance(error, TooLong):
        return Failure(code="context_length_exceeded", message=str(error))
    return Failure(code="verification_failed", message=f"{type(error).__name__}: {error}")


def failed(job: Job, verifier: str, batch: str, failure: Failure) -> Result:
    """A result that ends the session."""
    return _result(job, verifier, batch, Status.FAILED, error=failure)


def prefilled(job: Job, verifier: str, batch: str, outcome: VerifyOutcome, verify_ms: float) -> Result:
    """A chunk of the prompt is in the cache."""
    return _result(
        job,
        verifier,
        batch,
        Status.PREFILLED,
        cached=outcome.cached,
        new_tokens=outcome.new_tokens,
        verify_ms=verify_ms,
    )


def settled(
    job: Job, verifier: str, batch: str, outcome: VerifyOutcome | None, committed: Committed, verify_ms: float
) -> Result:
    """What the commit decided. `outcome` is None when the job only asked what is committed."""
    if committed.outcome in (CommitOutcome.GONE, CommitOutcome.CANCELLED):
        return failed(job, verifier, batch, GONE if committed.outcome is CommitOutcome.GONE else CANCELLED)
    return _result(
        job,
        verifier,
        batch,
        Status.COMMITTED if committed.outcome is CommitOutcome.COMMITTED else Status.CONFLICT,
        base_len=committed.base_len,
        accepted=committed.accepted,
        tokens=committed.tokens,
        trimmed_to=outcome.verified if outcome else 0,
        finish=committed.finish,
        cached=outcome.cached if outcome else 0,
        new_tokens=outcome.new_tokens if outcome else 0,
        verify_ms=verify_ms,
        logits_digest=outcome.logits_digest if outcome else None,
    )


def hidden_states(job: Job, outcome: VerifyOutcome | None, committed: Committed) -> list[HiddenStates]:
    """What the drafter asked to see of the target's hidden states, of committed tokens only."""
    if outcome is None or not _as_judged(outcome, committed):
        return []
    return [
        HiddenStates(
            session=job.session,
            round=job.round,
            start=part.start,
            count=part.count,
            size=part.size,
            format=part.format,
            rows=part.rows,
            scales=part.scales,
        )
        for part in outcome.hidden
    ]


def _as_judged(outcome: VerifyOutcome, committed: Committed) -> bool:
    """Whether the round's committed tokens are those that this verifier chose, now or for an earlier copy of it."""
    return (
        committed.outcome is CommitOutcome.COMMITTED
        and outcome.verdict is not None
        and committed.tokens == outcome.verdict.tokens
    )


def _result(job: Job, verifier: str, batch: str, status: Status, **told: Any) -> Result:
    known = {
        "session": job.session,
        "round": job.round,
        "base_len": job.base_len,
        "drafted": job.drafted,
        "draft_ms": job.draft_ms,
        "queue_ms": job.queue_ms,
    }
    return Result(status=status, verifier=verifier, batch=batch, **{**known, **told})
