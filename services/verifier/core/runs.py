"""Runs: sessions that the verifier decodes by itself, step after step, under a grant of the scheduler.

A step gives each run one token, and its accepted copies (`services.verifier.core.copies`).

A run begins after a round's verdict, while the round is still being committed. Its tokens are committed and
reported several steps at a time. A report is committed like a round: only onto the length that it builds on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.log_odds import SessionOffset
from shared.lookup import LookupText
from shared.messages import Finish, Job
from shared.state.commits import Commit

REPORT_MS = 50.0
"""All runs are reported with the first step that ends this long after the last report of one: well under usual promises
per token."""


@dataclass
class Run:
    """One session in a run. Times are on the verifier's monotonic clock."""

    job: Job
    """The session's latest job: its results go to this job's drafter and gateway."""
    lease: int
    """Lease under which it was granted."""
    task: VerifyTask
    """Input of its next step. `tokens` grows with each step."""
    left: int
    """Tokens that it may still decode."""
    until_ms: float
    round: int
    """Round number of its next report."""
    reported: int
    """Length of the session with the last report, or with the round before the first one."""
    reported_ms: float
    copies: int = 0
    """Most tokens that a step may copy from its text."""
    text: LookupText = field(default_factory=LookupText)
    copy_offset: SessionOffset = field(default_factory=SessionOffset)
    copied: list[int] = field(default_factory=list)
    """Indices into `unreported` of accepted copies."""
    verified: int = 0
    """Copied tokens that were verified since the last report."""
    confirmed: bool = False
    """True once the round that it began with is committed. Nothing is reported before."""
    reporting: bool = False
    """True while a report is being committed."""
    over: bool = False
    """True if it decodes no further token."""
    finish: Finish | None = None
    cached: int = 0
    verify_ms: float = 0.0
    """Time of the steps since the last report."""
    logprobs: bytes = b""
    """Records of the log-probabilities of the unreported tokens, if the session asks for them."""

    @property
    def length(self) -> int:
        """Length of the session, unreported tokens included."""
        return len(self.task.tokens)

    @property
    def unreported(self) -> list[int]:
        """Tokens decoded since the last report."""
        return self.task.tokens[self.reported :]


@dataclass(frozen=True)
class RunReport:
    """Tokens of a run on their way to the store and to the session's drafter and gateway."""

    run: Run
    commit: Commit
    left: int
    """Tokens that the run may still decode after these; 0 for the last report."""
    copied: Sequence[int]
    """Indices into the commit's tokens of accepted copies."""
    verified: int
    """Copied tokens that were verified."""
    verify_ms: float
    logits_digest: str | None


class RunTable:
    """The runs of one verifier, by session."""

    def __init__(self, *, digests: bool) -> None:
        """digests: reports carry digests of the logits."""
        self._runs: dict[str, Run] = {}
        self._digests = digests
        self._closed = False

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, session_id: str) -> Run | None:
        """Return the session's run; None if it has none."""
        return self._runs.get(session_id)

    @property
    def decoding(self) -> bool:
        """True if a run needs another step."""
        return any(not run.over for run in self._runs.values())

    def start(self, job: Job, task: VerifyTask, outcome: VerifyOutcome, lease: int, now_ms: float) -> Run | None:
        """Start the run that a job grants after its verdict; None if it grants none or the session has ended.

        There are no runs without a lease: a verifier that was given up could commit their tokens at any time.
        """
        verdict = outcome.verdict
        if job.run is None or verdict is None or verdict.finish is not None or self._closed or not lease:
            return None
        tokens = [*task.tokens, *verdict.tokens]
        step = VerifyTask(
            session_id=task.session_id,
            tokens=tokens,
            draft=[],
            sampling=task.sampling,
            stop_ids=task.stop_ids,
            room=task.room - len(verdict.tokens),
            prompt_len=task.prompt_len,
            digest=hashlib.sha256() if self._digests else None,
        )
        run = Run(
            job=job,
            lease=lease,
            task=step,
            left=job.run.tokens,
            until_ms=now_ms + job.run.ms,
            round=job.round + 1,
            reported=len(tokens),
            reported_ms=now_ms,
            copies=job.run.copies,
        )
        self._runs[task.session_id] = run
        return run

    def join(self, job: Job) -> Run | None:
        """Return the run of a job's session, and send its results to this job's drafter and gateway from now on.

        A job that grants no run halts it.
        """
        run = self._runs.get(job.session)
        if run is not None:
            run.job = job
            if job.run is None:
                self.halt([job.session])
        return run

    def step(self, lease: int, now_ms: float) -> list[Run]:
        """Return the runs that take part in the step that starts now. Runs of another lease are dropped."""
        for run in [run for run in self._runs.values() if run.lease != lease]:
            self.drop(run)
        return [run for run in self._runs.values() if not run.over]

    def record(self, run: Run, outcome: VerifyOutcome, step_ms: float, now_ms: float) -> None:
        """Add the outcome of a run's step. A refused step ends the run: the session's next round gets the reason."""
        verdict, task = outcome.verdict, run.task
        if verdict is None:
            run.over = True
            if run.length == run.reported and not run.reporting:
                self.drop(run)
            return
        before = len(run.unreported)
        run.copied.extend(range(before, before + verdict.accepted))
        run.verified += outcome.verified
        task.tokens.extend(verdict.tokens)
        run.task = replace(task, room=task.room - len(verdict.tokens))
        run.left -= len(verdict.tokens)
        run.finish, run.cached = verdict.finish, outcome.cached
        run.verify_ms += step_ms
        run.logprobs += outcome.logprobs
        run.over = run.finish is not None or run.left <= 0 or now_ms >= run.until_ms

    def due(self, now_ms: float, *, between_steps: bool) -> list[RunReport]:
        """Return the reports that are due: of runs that are over, and of all once the last report of one is long ago.

        Reports that come together are committed and sent together. between_steps: False while a step may be running,
        when only runs that are over can be reported.
        """
        ready = [
            run
            for run in self._runs.values()
            if run.confirmed and not run.reporting and run.length > run.reported and (run.over or between_steps)
        ]
        if not any(now_ms - run.reported_ms >= REPORT_MS for run in ready):
            ready = [run for run in ready if run.over]
        return [self._report(run, now_ms) for run in ready]

    def _report(self, run: Run, now_ms: float) -> RunReport:
        commit = Commit(
            run.job.session,
            run.round,
            run.reported,
            0,
            tuple(run.unreported),
            run.finish,
            run.cached,
            logprobs=run.logprobs,
        )
        digest = None
        if run.task.digest is not None:
            digest = run.task.digest.hexdigest()[:16]
            run.task = replace(run.task, digest=hashlib.sha256())
        left = 0 if run.over else max(1, run.left)
        report = RunReport(run, commit, left, run.copied, run.verified, run.verify_ms, digest)
        run.round += 1
        run.copied, run.verified = [], 0
        run.reported, run.reported_ms, run.reporting = run.length, now_ms, True
        run.verify_ms, run.logprobs = 0.0, b""
        return report

    def reported(self, report: RunReport) -> None:
        """Note that a report is committed. After the last one the run is gone.

        A run that a refused step has ended meanwhile has nothing more to report, so this report was its last one.
        """
        run = report.run
        run.reporting = False
        if report.left == 0 or (run.over and run.length == run.reported):
            self.drop(run)

    def drop(self, run: Run) -> None:
        """Forget a run. Its unreported tokens are decoded again in the session's next round."""
        if self._runs.get(run.job.session) is run:
            del self._runs[run.job.session]

    def release(self, session_ids: Iterable[str]) -> None:
        """Forget the runs of sessions that have ended or moved."""
        for session_id in session_ids:
            self._runs.pop(session_id, None)

    def halt(self, session_ids: Iterable[str]) -> None:
        """End the runs of these sessions with their next step; its tokens come with their last report."""
        for session_id in session_ids:
            if (run := self._runs.get(session_id)) is not None:
                run.left = min(run.left, 1)

    def close(self) -> None:
        """Halt all runs and start no more: the verifier drains."""
        self._closed = True
        self.halt(list(self._runs))
