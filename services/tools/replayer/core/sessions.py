"""Recorded sessions: requests, rounds, jobs and results put together from recorded messages.

Times come from the senders' clocks, so the time between two services is only as right as their clocks agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.tools.replayer.core.recording import JournalEntry
from shared.messages import (
    Batch,
    Cancel,
    Ended,
    Finish,
    Generate,
    Job,
    Load,
    Result,
    Slo,
    Status,
    Verify,
)


@dataclass
class RecordedJob:
    """A round's job in one batch, with its result."""

    batch_id: str
    scheduler_id: str
    verifier_id: str
    job: Job
    policy: str
    predicted_ms: float
    waiting: int
    """Pending rounds that were not in the batch."""
    mates: list[str]
    """Ids of the other sessions in the batch."""
    at_ms: float | None
    """Send time of the batch."""
    result: Result | None = None
    result_ms: float | None = None
    """Send time of the result."""
    before: str | None = None
    """Id of the batch that the verifier received before this one."""
    free_ms: float | None = None
    """Send time of the last result of that batch."""


@dataclass
class RecordedRound:
    """A round of a session."""

    verify: Verify
    """The first attempt."""
    sent_ms: list[float | None]
    """Send time of each attempt."""
    price_ms: float | None
    """The scheduler's last published price of a verified token."""
    jobs: list[RecordedJob] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Batches sent without this round while it was pending, each with the reason."""
    result: Result | None = None
    """The result that ended the round."""
    result_ms: float | None = None
    repeated: int = 0
    """Number of further results."""


@dataclass
class RecordedRun:
    """A run: tokens that a verifier decoded by itself after a round."""

    after: int
    """Number of that round."""
    begun_ms: float | None
    """Send time of that round's result."""
    reports: list[Result] = field(default_factory=list)
    """Its results, in the order in which they were sent."""
    sent_ms: list[float | None] = field(default_factory=list)
    """Send time of each."""


@dataclass
class RecordedSession:
    """A session as far as it was recorded."""

    session_id: str
    generate: Generate | None = None
    generate_ms: float | None = None
    pool: str = ""
    rounds: dict[int, RecordedRound] = field(default_factory=dict)
    runs: list[RecordedRun] = field(default_factory=list)
    ended: Ended | None = None
    ended_ms: float | None = None
    cancelled: Cancel | None = None
    cancelled_ms: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def start_ms(self) -> float | None:
        """Arrival of the request at the gateway; without a recorded Generate, the first recorded send time."""
        if self.generate is not None and self.generate_ms is not None:
            return self.generate_ms - self.generate.elapsed_ms
        times = [at for round_ in self.rounds.values() for at in round_.sent_ms if at is not None]
        return min(times, default=self.ended_ms)

    @property
    def end_ms(self) -> float | None:
        """The last recorded send time."""
        times = [self.ended_ms, self.cancelled_ms, self.generate_ms]
        for round_ in self.rounds.values():
            times += [*round_.sent_ms, round_.result_ms]
        for run in self.runs:
            times += run.sent_ms
        return max((at for at in times if at is not None), default=None)

    @property
    def settled(self) -> list[RecordedRound]:
        """Rounds whose result has tokens, in order."""
        rounds = (self.rounds[number] for number in sorted(self.rounds))
        return [round_ for round_ in rounds if round_.result is not None and round_.result.tokens]

    @property
    def results(self) -> list[Result]:
        """The results of rounds and runs that have tokens, in order of their tokens."""
        found = [round_.result for round_ in self.settled if round_.result is not None]
        found += [report for run in self.runs for report in run.reports if report.tokens]
        return sorted(found, key=lambda result: result.base_len)

    @property
    def finish(self) -> Finish | None:
        """Reason for the end of the text; None if it did not end."""
        return next((result.finish for result in self.results if result.finish), None)

    @property
    def complete(self) -> bool:
        """True if the text ended by a stop token or at its length limit."""
        return self.finish is not None or (self.ended is not None and self.ended.reason in (Finish.STOP, Finish.LENGTH))

    @property
    def slo(self) -> Slo | None:
        """The promised times; None without a promise or a recorded Generate."""
        return self.generate.slo if self.generate else None

    @property
    def service_class(self) -> str:
        """Service class; empty if no recorded message names it."""
        if self.generate is not None:
            return self.generate.service_class
        if self.ended is not None:
            return self.ended.service_class
        return next((round_.verify.service_class for round_ in self.rounds.values()), "")

    def output(self) -> dict[int, int]:
        """Return the committed tokens by position, without the prompt."""
        tokens: dict[int, int] = {}
        for result in self.results:
            tokens.update(enumerate(result.tokens, result.base_len))
        return tokens


class SessionReader:
    """Builds the sessions of a recording from its messages, in one pass from the beginning."""

    def __init__(self) -> None:
        self.sessions: dict[str, RecordedSession] = {}
        self._price_ms: float | None = None
        self._last_batch_ids: dict[str, str] = {}
        """Latest batch of each verifier."""
        self._done_ms: dict[str, float] = {}
        """Send time of each batch's last result."""
        self._pending: dict[str, RecordedRound] = {}
        """Pending round of each session."""

    def feed(self, entry: JournalEntry) -> None:
        """Take in one message."""
        message = entry.message
        match message:
            case Generate():
                session = self._session(message.session)
                session.generate, session.generate_ms = message, entry.at_ms
                session.pool = entry.key.partition(".")[2]
            case Verify():
                self._verify(message, entry.at_ms)
            case Batch():
                self._batch(message, entry)
            case Result():
                self._result(message, entry.at_ms)
            case Load():
                self._price_ms = message.price_ms
            case Ended():
                session = self._session(message.session)
                session.ended, session.ended_ms = message, entry.at_ms
            case Cancel():
                session = self._session(message.session)
                session.cancelled, session.cancelled_ms = message, entry.at_ms

    def _session(self, session_id: str) -> RecordedSession:
        return self.sessions.setdefault(session_id, RecordedSession(session_id))

    def _verify(self, verify: Verify, at_ms: float | None) -> None:
        session = self._session(verify.session)
        known = session.rounds.get(verify.round)
        if known is not None and known.result is None:
            known.sent_ms.append(at_ms)
            if known.verify.drafter != verify.drafter:
                session.notes.append(f"drafter {verify.drafter} took over round {verify.round}")
            return
        if known is not None:
            return  # resent while its result was under way
        session.rounds[verify.round] = self._pending[verify.session] = RecordedRound(verify, [at_ms], self._price_ms)

    def _batch(self, batch: Batch, entry: JournalEntry) -> None:
        verifier_id = entry.key.partition(".")[2]
        before = self._last_batch_ids.get(verifier_id)
        self._last_batch_ids[verifier_id] = batch.batch
        session_ids = [job.session for job in batch.jobs]
        for job in batch.jobs:
            round_ = self._session(job.session).rounds.get(job.round)
            if round_ is None:
                continue
            self._pending.pop(job.session, None)
            mates = [session_id for session_id in session_ids if session_id != job.session]
            round_.jobs.append(
                RecordedJob(
                    batch.batch,
                    batch.scheduler,
                    verifier_id,
                    job,
                    batch.policy,
                    batch.predicted_ms,
                    batch.waiting,
                    mates,
                    entry.at_ms,
                    before=before,
                )
            )
        for left in batch.left_out:
            if (pending := self._pending.get(left.session)) is not None:
                pending.left_out.append((batch.batch, left.reason))

    def _result(self, result: Result, at_ms: float | None) -> None:
        if result.run:
            self._report(result, at_ms)
            return
        round_ = self._session(result.session).rounds.get(result.round)
        if at_ms is not None:
            self._done_ms[result.batch] = max(at_ms, self._done_ms.get(result.batch, 0.0))
        if round_ is None:
            return
        job = next((job for job in round_.jobs if job.batch_id == result.batch and job.result is None), None)
        if job is not None:
            job.result, job.result_ms = result, at_ms
            job.free_ms = self._done_ms.get(job.before or "")
        if result.status is Status.PREFILLED:
            self._pending[result.session] = round_
        elif round_.result is None:
            round_.result, round_.result_ms = result, at_ms
            if result.run_left and result.status is Status.COMMITTED:
                self._session(result.session).runs.append(RecordedRun(result.round, at_ms))
        else:
            round_.repeated += 1

    def _report(self, result: Result, at_ms: float | None) -> None:
        """Add a report to the session's last run."""
        runs = self._session(result.session).runs
        if not runs:
            runs.append(RecordedRun(result.round - 1, None))  # its beginning is not in the recording
        runs[-1].reports.append(result)
        runs[-1].sent_ms.append(at_ms)


def read_sessions(entries: Iterable[JournalEntry]) -> dict[str, RecordedSession]:
    """Return the sessions of a recording by id."""
    reader = SessionReader()
    for entry in entries:
        reader.feed(entry)
    return reader.sessions
