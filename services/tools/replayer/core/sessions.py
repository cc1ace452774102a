"""The lives of sessions, put together from recorded messages: which round went where, and how long each step took.
Pure.

Times are the senders' own clocks, so a step between two services is as right as their clocks agree. Where a message
seems to have arrived before it was sent, the step counts as 0 and the disagreement is told (`Inversion`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.tools.replayer.core.recording import Entry
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

UNCERTAIN_MS = 0.05
"""Clocks of one machine read in two processes may seem to disagree by this much."""


@dataclass
class Sent:
    """One job of a batch: when it was sent, and what came of it."""

    batch: str
    scheduler: str
    verifier: str
    job: Job
    policy: str
    predicted_ms: float
    waiting: int
    """Rounds that were not in the batch."""
    mates: list[str]
    """The other sessions in the batch."""
    at_ms: float | None
    result: Result | None = None
    result_ms: float | None = None
    """When the result was sent."""
    before: str | None = None
    """The batch that the verifier was given before this one."""
    free_ms: float | None = None
    """When the verifier sent the last result of that."""


@dataclass
class Round:
    """One round of a session."""

    verify: Verify
    """As it was sent first."""
    sent_ms: list[float | None]
    """When it was sent, once for each attempt."""
    price_ms: float | None
    """The scheduler's price of a verified token, as last told before."""
    jobs: list[Sent] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Batches that went out without it while it waited, and why."""
    result: Result | None = None
    """What settled it."""
    result_ms: float | None = None
    repeated: int = 0
    """Further results for it."""


@dataclass
class Life:
    """A session, as far as it was recorded."""

    session: str
    generate: Generate | None = None
    generate_ms: float | None = None
    pool: str = ""
    rounds: dict[int, Round] = field(default_factory=dict)
    ended: Ended | None = None
    ended_ms: float | None = None
    cancelled: Cancel | None = None
    cancelled_ms: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def start_ms(self) -> float | None:
        """When its request reached the gateway; without its Generate, when it was first heard of."""
        if self.generate is not None and self.generate_ms is not None:
            return self.generate_ms - self.generate.elapsed_ms
        times = [at for one in self.rounds.values() for at in one.sent_ms if at is not None]
        return min(times, default=self.ended_ms)

    @property
    def end_ms(self) -> float | None:
        """When it was last heard of."""
        times = [self.ended_ms, self.cancelled_ms, self.generate_ms]
        for one in self.rounds.values():
            times += [*one.sent_ms, one.result_ms]
        return max((at for at in times if at is not None), default=None)

    @property
    def settled(self) -> list[Round]:
        """Rounds that brought tokens, in order."""
        rounds = (self.rounds[number] for number in sorted(self.rounds))
        return [one for one in rounds if one.result is not None and one.result.tokens]

    @property
    def finish(self) -> Finish | None:
        """Why the text ended, if it did."""
        return next((r.result.finish for r in self.settled if r.result is not None and r.result.finish), None)

    @property
    def whole(self) -> bool:
        """Whether its text came to its own end."""
        return self.finish is not None or (self.ended is not None and self.ended.reason in (Finish.STOP, Finish.LENGTH))

    @property
    def slo(self) -> Slo | None:
        """What it was promised."""
        return self.generate.slo if self.generate else None

    @property
    def service_class(self) -> str:
        """Its service class."""
        if self.generate is not None:
            return self.generate.service_class
        if self.ended is not None:
            return self.ended.service_class
        return next((one.verify.service_class for one in self.rounds.values()), "")

    def output(self) -> dict[int, int]:
        """Its committed tokens by position, prompt excluded."""
        tokens: dict[int, int] = {}
        for one in self.settled:
            assert one.result is not None
            tokens.update(enumerate(one.result.tokens, one.result.base_len))
        return tokens


class Lives:
    """Reads a recording once, from its beginning."""

    def __init__(self) -> None:
        self.of: dict[str, Life] = {}
        self._price_ms: float | None = None
        self._last: dict[str, str] = {}
        """Latest batch of each verifier."""
        self._done_ms: dict[str, float] = {}
        """When the last result of a batch was sent."""
        self._open: dict[str, Round] = {}
        """The round of each session that waits for its batch."""

    def read(self, entries: Iterable[Entry]) -> Lives:
        """Take in these messages."""
        for entry in entries:
            self.feed(entry)
        return self

    def feed(self, entry: Entry) -> None:
        """Take in one message."""
        message = entry.message
        match message:
            case Generate():
                life = self._life(message.session)
                life.generate, life.generate_ms = message, entry.at_ms
                life.pool = entry.key.partition(".")[2]
            case Verify():
                self._verify(message, entry.at_ms)
            case Batch():
                self._batch(message, entry)
            case Result():
                self._result(message, entry.at_ms)
            case Load():
                self._price_ms = message.price_ms
            case Ended():
                life = self._life(message.session)
                life.ended, life.ended_ms = message, entry.at_ms
            case Cancel():
                life = self._life(message.session)
                life.cancelled, life.cancelled_ms = message, entry.at_ms

    def _life(self, session: str) -> Life:
        return self.of.setdefault(session, Life(session))

    def _verify(self, verify: Verify, at_ms: float | None) -> None:
        life = self._life(verify.session)
        known = life.rounds.get(verify.round)
        if known is not None and known.result is None:
            known.sent_ms.append(at_ms)
            if known.verify.drafter != verify.drafter:
                life.notes.append(f"round {verify.round} was taken over by drafter {verify.drafter}")
            return
        if known is not None:
            return  # sent again although its result was on its way
        life.rounds[verify.round] = self._open[verify.session] = Round(verify, [at_ms], self._price_ms)

    def _batch(self, batch: Batch, entry: Entry) -> None:
        verifier = entry.key.partition(".")[2]
        before = self._last.get(verifier)
        self._last[verifier] = batch.batch
        sessions = [job.session for job in batch.jobs]
        for job in batch.jobs:
            one = self._life(job.session).rounds.get(job.round)
            if one is None:
                continue
            self._open.pop(job.session, None)
            mates = [session for session in sessions if session != job.session]
            one.jobs.append(
                Sent(
                    batch.batch,
                    batch.scheduler,
                    verifier,
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
            if (waiting := self._open.get(left.session)) is not None:
                waiting.left_out.append((batch.batch, left.reason))

    def _result(self, result: Result, at_ms: float | None) -> None:
        one = self._life(result.session).rounds.get(result.round)
        if at_ms is not None:
            self._done_ms[result.batch] = max(at_ms, self._done_ms.get(result.batch, 0.0))
        if one is None:
            return
        sent = next((job for job in one.jobs if job.batch == result.batch and job.result is None), None)
        if sent is not None:
            sent.result, sent.result_ms = result, at_ms
            sent.free_ms = self._done_ms.get(sent.before or "")
        if result.status is Status.PREFILLED:
            self._open[result.session] = one
        elif one.result is None:
            one.result, one.result_ms = result, at_ms
        else:
            one.repeated += 1
