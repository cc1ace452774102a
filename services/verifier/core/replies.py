"""Replies to a batch: what is committed, and the messages that follow from the commit script's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.verifier.core.runs import RunReport, RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.errors import GrammarError, NoTokenAllowed, TooLong
from shared.messages import Failure, HiddenStates, Job, Result, Status
from shared.messages.logprobs import as_text
from shared.state.commits import Commit, CommitOutcome, Committed

GONE = Failure(
    code="session_gone",
    message="the session's state is not in Redis any more (expired, or the data was lost); send the request again",
)
FORBIDDEN = Failure(code="forbidden", message="the job's session key is wrong or missing")
CANCELLED = Failure(code="cancelled", message="the session was cancelled")
MOST_GROUPED = 100
"""Most results in one message."""
RUN_BATCH = "run"
"""`Result.batch` of tokens that were decoded in a run."""


@dataclass(frozen=True)
class JobReply:
    """Messages that answer one job."""

    job: Job
    result: Result
    hidden: Sequence[HiddenStates] = ()

    @property
    def for_drafter(self) -> bool:
        """True if the drafter gets the result. A chunk of prefill settles no round."""
        return self.for_gateway and self.result.status is not Status.PREFILLED

    @property
    def for_gateway(self) -> bool:
        """True if the gateway gets the result. A job that is possibly forged is answered to the scheduler only."""
        return self.result.error != FORBIDDEN

    @property
    def receivers(self) -> tuple[str, ...]:
        """Ids of the drafter and the gateway that get the result beside the schedulers."""
        drafter = (self.job.drafter,) if self.for_drafter else ()
        gateway = (self.job.gateway,) if self.for_gateway else ()
        return drafter + gateway

    @property
    def hidden_rows(self) -> int:
        """Rows of hidden states."""
        return sum(states.count for states in self.hidden)


@dataclass(frozen=True)
class OpenCommit:
    """A commit whose answer decides the job's result. Without an outcome it only asks what is committed."""

    job: Job
    outcome: VerifyOutcome | None
    commit: Commit


def groups(answers: Sequence[JobReply]) -> list[list[JobReply]]:
    """Return the replies in groups that travel as one message, each in order.

    The replies of a group have the same receivers, and all of these can read groups. A reply with hidden states is a
    group of its own, and stays at the end: its hidden states are sent just before it.
    """
    made: list[list[JobReply]] = []
    open_: dict[tuple[str, ...], list[JobReply]] = {}
    for reply in answers:
        group = open_.get(reply.receivers)
        if group is not None and len(group) < MOST_GROUPED and reply.job.grouped and not reply.hidden:
            group.append(reply)
            continue
        made.append([reply])
        if reply.job.grouped and not reply.hidden:
            open_[reply.receivers] = made[-1]
    return made


class BatchReplies:
    """Collects the replies to one batch."""

    def __init__(
        self,
        verifier_id: str,
        batch_id: str,
        verify_ms: float,
        arithmetic: str,
        runs: RunTable,
        predicted_ms: float = 0.0,
    ) -> None:
        """runs: of the verifier; a result says how far its session's run may go. predicted_ms: by the scheduler."""
        self._verifier_id = verifier_id
        self._batch_id = batch_id
        self._verify_ms = verify_ms
        self._predicted_ms = predicted_ms
        self._arithmetic = arithmetic
        self._runs = runs
        self._replies: list[JobReply] = []
        self.open: list[OpenCommit] = []
        """Commits without an answer so far."""

    def fail(self, job: Job, failure: Failure) -> None:
        """Answer a job with a failure, which ends its session."""
        self._replies.append(JobReply(job, self._failed(job, failure)))

    def ask(self, job: Job) -> None:
        """Let the commit script answer a job that does not build on what this verifier has: nothing is committed."""
        self.open.append(OpenCommit(job, None, Commit(job.session, job.round, job.base_len, 0, (), None, 0)))

    def verified(self, job: Job, task: VerifyTask, outcome: VerifyOutcome) -> None:
        """Commit the verdict of a job that the model has verified, or answer one without a verdict."""
        if outcome.error is not None:
            self.fail(job, refused(outcome.error))
        elif (verdict := outcome.verdict) is None:
            self._replies.append(JobReply(job, self._prefilled(job, outcome)))
        else:
            commit = Commit(
                job.session,
                job.round,
                len(task.tokens),
                verdict.accepted,
                verdict.tokens,
                verdict.finish,
                outcome.cached,
                logprobs=outcome.logprobs,
            )
            self.open.append(OpenCommit(job, outcome, commit))

    def settle(self, answers: Sequence[Committed]) -> list[JobReply]:
        """Return all replies, given the answers to the open commits in order; those with hidden states come last.

        The hidden states of a prompt are megabytes: no other session's result waits behind them.
        """
        for one, answer in zip(self.open, answers, strict=True):
            result = self._settled(one.job, one.outcome, answer)
            self._replies.append(JobReply(one.job, result, hidden_states(one.job, one.outcome, answer)))
        return sorted(self._replies, key=lambda reply: reply.hidden_rows)

    def reported(self, report: RunReport, answer: Committed) -> JobReply:
        """Return the reply that reports tokens of a run, given the answer to their commit."""
        job, commit = report.run.job, report.commit
        if answer.outcome in (CommitOutcome.GONE, CommitOutcome.CANCELLED):
            failure = GONE if answer.outcome is CommitOutcome.GONE else CANCELLED
            result = self._failed(job, failure).model_copy(update={"round": commit.round, "batch": RUN_BATCH})
            return JobReply(job, result)
        committed = answer.outcome is CommitOutcome.COMMITTED
        result = Result(
            session=commit.session_id,
            round=commit.round,
            base_len=answer.base_len,
            status=Status.COMMITTED if committed else Status.CONFLICT,
            verifier=self._verifier_id,
            batch=RUN_BATCH,
            tokens=answer.tokens,
            run=True,
            copied=list(report.copied) if committed else [],
            trimmed_to=report.verified if committed else 0,
            run_left=report.left if self._runs.get(commit.session_id) is report.run else 0,
            finish=answer.finish,
            cached=commit.cached,
            new_tokens=len(commit.tokens) - len(report.copied) + report.verified,
            verify_ms=report.verify_ms,
            logits_digest=report.logits_digest,
            logprobs=as_text(commit.logprobs) if committed and answer.tokens == list(commit.tokens) else "",
            logprobs_from=commit.base_len,
            arithmetic=self._arithmetic,
            committed_in=answer.committed_in,
        )
        return JobReply(job, result)

    def _prefilled(self, job: Job, outcome: VerifyOutcome) -> Result:
        return self._result(
            job,
            Status.PREFILLED,
            cached=outcome.cached,
            new_tokens=outcome.new_tokens,
            verify_ms=self._verify_ms,
        )

    def _settled(self, job: Job, outcome: VerifyOutcome | None, answer: Committed) -> Result:
        if answer.outcome in (CommitOutcome.GONE, CommitOutcome.CANCELLED):
            return self._failed(job, GONE if answer.outcome is CommitOutcome.GONE else CANCELLED)
        own = outcome if has_committed(outcome, answer) else None
        return self._result(
            job,
            Status.COMMITTED if answer.outcome is CommitOutcome.COMMITTED else Status.CONFLICT,
            base_len=answer.base_len,
            accepted=answer.accepted,
            tokens=answer.tokens,
            trimmed_to=outcome.verified if outcome else 0,
            finish=answer.finish,
            cached=outcome.cached if outcome else 0,
            new_tokens=outcome.new_tokens if outcome else 0,
            verify_ms=self._verify_ms,
            logits_digest=outcome.logits_digest if outcome else None,
            committed_in=answer.committed_in,
            logprobs=as_text(own.logprobs) if own else "",
            logprobs_from=own.logprobs_from if own else 0,
            run_left=0 if (run := self._runs.get(job.session)) is None else max(1, run.left),
        )

    def _failed(self, job: Job, failure: Failure) -> Result:
        return self._result(job, Status.FAILED, error=failure)

    def _result(self, job: Job, status: Status, **fields: Any) -> Result:
        from_job = {
            "session": job.session,
            "round": job.round,
            "base_len": job.base_len,
            "drafted": job.drafted,
            "draft_ms": job.draft_ms,
            "queue_ms": job.queue_ms,
            "arithmetic": self._arithmetic,
            "sources": job.sources,
            "predicted_ms": self._predicted_ms,
        }
        return Result(status=status, verifier=self._verifier_id, batch=self._batch_id, **{**from_job, **fields})


def wrong_model(job: Job, fingerprint: str) -> Failure:
    """Return the failure of a session for another model than this verifier's."""
    return Failure(
        code="wrong_model",
        message=f"the session is for model {job.fingerprint}, this verifier serves {fingerprint}; "
        "use the same model folder and dtype for gateway and verifiers",
    )


def refused(error: Exception) -> Failure:
    """Return the failure of a job that the engine refused with this error."""
    if isinstance(error, TooLong):
        return Failure(code="context_length_exceeded", message=str(error))
    if isinstance(error, GrammarError):
        return Failure(code="grammar_failed", message=str(error))
    if isinstance(error, NoTokenAllowed):
        return Failure(code="no_token_allowed", message=str(error))
    return Failure(code="verification_failed", message=f"{type(error).__name__}: {error}")


def has_committed(outcome: VerifyOutcome | None, answer: Committed) -> bool:
    """Return whether the committed tokens are those that this verifier chose, now or for an earlier copy."""
    if outcome is None or outcome.verdict is None:
        return False
    return answer.outcome is CommitOutcome.COMMITTED and answer.tokens == outcome.verdict.tokens


def hidden_states(job: Job, outcome: VerifyOutcome | None, answer: Committed) -> list[HiddenStates]:
    """Return the hidden states that the drafter asked for, of committed tokens only.

    There are none if the committed tokens are not those that this verifier chose, now or for an earlier copy.
    """
    if outcome is None or not has_committed(outcome, answer):
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
