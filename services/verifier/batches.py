"""The verifier's loop: step after step through the model, each with the next batch and the next token of every run.

A step without a batch serves the runs alone; without runs the loop waits for a batch. One step is committed and
replied to while the next one computes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from services.verifier import metrics
from services.verifier.core import replies
from services.verifier.core.copies import ProposedCopy, RunCopies
from services.verifier.core.emulation import EmulatedCost
from services.verifier.core.replies import BatchReplies, JobReply, OpenCommit
from services.verifier.core.runs import Run, RunReport, RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.engine_thread import EngineThread
from services.verifier.handoff import Handoff
from services.verifier.job_spans import BatchSpans, RunSpans
from services.verifier.membership import Membership
from services.verifier.sessions import SessionTable
from services.verifier.verify import verify
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.session_keys import SessionKeys
from shared.errors import BrokersError, Fenced
from shared.grammar.masks import Grammars
from shared.messages import Batch, BatchShape, Failure, Job, Measurement, features_of, model_of
from shared.runtime import logging, tracing
from shared.state.commits import Committed
from shared.state.store import Store

IDLE_S = 1.0
"""Without a batch for this long, the verifier checks its KV cache."""


@dataclass
class StepWork:
    """A step on its way through the verifier."""

    batch: Batch | None = None
    tasks: list[tuple[Job, VerifyTask]] = field(default_factory=list)
    """Jobs for the model."""
    failed: list[tuple[Job, Failure]] = field(default_factory=list)
    """Jobs that are refused before the model runs."""
    stale: list[Job] = field(default_factory=list)
    """Jobs of sessions that are gone, cancelled, ended or of another length: the commit script answers them."""
    runs: list[Run] = field(default_factory=list)
    """Runs that take part in this step."""
    copies: list[ProposedCopy] = field(default_factory=list)
    """What each run may copy in this step; empty beside a batch."""
    reports: list[RunReport] = field(default_factory=list)
    """Tokens of runs to commit with this step."""
    outcomes: list[VerifyOutcome] = field(default_factory=list)
    """Outcome of each task."""
    shapes: list[BatchShape] = field(default_factory=list)
    """Shape of each forward pass."""
    verify_ms: float = 0.0
    spans: BatchSpans | None = None
    """Spans of the batch's traced jobs; None if it has none."""


class BatchLoop:
    """Runs batches in the engine's thread; commits and replies to one while the next one runs."""

    def __init__(
        self,
        membership: Membership,
        sessions: SessionTable,
        engine_thread: EngineThread,
        handoff: Handoff,
        broker: Broker,
        store: Store,
        session_keys: SessionKeys,
        *,
        grammars: Grammars | None,
        emulated: EmulatedCost | None,
        digests: bool,
    ) -> None:
        """emulated: makes batches take longer. digests: results carry digests of the logits."""
        self._membership = membership
        self._sessions = sessions
        self._thread = engine_thread
        self._handoff = handoff
        self._broker = broker
        self._store = store
        self._session_keys = session_keys
        self._grammars = grammars
        self._emulated = emulated
        self._digests = digests
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._arriving: deque[Batch] = deque()
        """Batches whose sessions are being read while runs go on, the next one first."""
        self._arrivals: asyncio.Task[None] | None = None
        self._read: set[str] = set()
        """Ids of batches in `_batches` whose sessions were read."""
        self._spans: dict[str, BatchSpans] = {}
        """Spans of accepted batches with traced jobs, by the batch's id."""
        self._run_spans = RunSpans()
        self._replies: set[asyncio.Task[None]] = set()
        self._busy = False
        self._unchecked = False
        """True if a step has run since the last check of the KV cache."""
        self.runs = RunTable(digests=digests)
        """The sessions that decode without rounds."""
        self.copies = RunCopies()
        self._log = logging.get()

    @property
    def idle(self) -> bool:
        """True if every accepted batch is replied to and no run goes on."""
        return not (self._arriving or self._busy or self._replies or self.runs) and self._batches.empty()

    def put(self, batch: Batch) -> None:
        """Accept a batch."""
        self._log.debug("batch received", batch=batch.batch, jobs=[[job.session, job.round] for job in batch.jobs])
        if tracing.is_on() and (spans := BatchSpans.begin(batch, self._membership.verifier_id)).jobs:
            self._spans[batch.batch] = spans
        if not (self._arriving or self.runs.decoding):
            self._batches.put_nowait(batch)
            return
        self._arriving.append(batch)
        if self._arrivals is None or self._arrivals.done():
            self._arrivals = asyncio.create_task(self._read_arriving())

    async def _read_arriving(self) -> None:
        """Read the sessions of arriving batches from Redis beside the steps of runs, which do not wait for it."""
        while self._arriving:
            batch = self._arriving[0]
            try:
                await self._recall([job for job in batch.jobs if self._may_read(job)])
                self._read.add(batch.batch)
            except BrokersError as error:
                self._log.warning("sessions not read, tried again with their batch", error=str(error))
            except Exception:
                # The batch reports it. The batches behind this one must not wait for ever.
                self._log.exception("sessions not read, tried again with their batch")
            finally:
                self._batches.put_nowait(self._arriving.popleft())

    def _may_read(self, job: Job) -> bool:
        """Return whether a job's session may be read: the job has its key, and no run decodes it here."""
        return self._session_keys.accepts(job) and self._serves(job) and self.runs.get(job.session) is None

    def _serves(self, job: Job) -> bool:
        """Return whether this verifier has the job's model and the features that its session needs."""
        same_model = model_of(job.fingerprint) == self._membership.fingerprint
        return same_model and features_of(job.fingerprint) <= set(self._membership.features)

    async def _recall(self, jobs: Sequence[Job]) -> None:
        """Read the jobs' sessions if this verifier does not remember them, and load KV that it lacks."""
        await self._sessions.recall(jobs)
        remembered = [job.session for job in jobs if self._sessions.remembers(job)]
        uncached = [session_id for session_id in remembered if not self._sessions.cached.get(session_id)]
        await self._handoff.load({session_id: self._sessions.tokens(session_id) for session_id in uncached})

    async def run(self) -> None:
        """Work for ever."""
        while True:
            batch = await self._next()
            self._busy = True
            spans = None if batch is None else self._spans.pop(batch.batch, None)
            if batch is not None and self._membership.is_fenced(batch.lease):
                self._log.warning("batch of an ended lease dropped", batch=batch.batch, lease=batch.lease)
                self._read.discard(batch.batch)
                batch = None
                if spans is not None:
                    spans.end()
            with structlog.contextvars.bound_contextvars(**({} if batch is None else {"batch": batch.batch})):
                try:
                    await self._step(batch, spans)
                except BrokersError as error:
                    # Nothing was committed: the drafters' round timeouts send these rounds again.
                    self._log.warning("batch dropped", error=str(error))
                    if spans is not None:
                        spans.end()
            self._busy = False

    async def _next(self) -> Batch | None:
        """Return the next batch; None to go on with the runs alone. Once in each idle time, check the KV cache."""
        if self.runs.decoding:
            return None if self._batches.empty() else self._batches.get_nowait()
        if self._unchecked:
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    return await self._batches.get()
            await self._sessions.check_integrity()
            self._unchecked = False
        return await self._batches.get()

    async def _step(self, batch: Batch | None, spans: BatchSpans | None) -> None:
        work = StepWork() if batch is None else await self._prepare(batch)
        work.spans = spans
        work.runs = self.runs.step(self._membership.lease, _now_ms())
        if work.tasks or work.runs:
            self._unchecked = True
            self._log.debug("model started")
            if work.spans is not None:
                work.spans.event("model started")
            started = time.perf_counter()
            await self._thread.run(lambda: self._run_model(work))
            work.verify_ms = (time.perf_counter() - started) * 1000
            self._log.debug("model done")
            if work.spans is not None:
                work.spans.event("model done")
            metrics.BATCHES.inc()
            metrics.BATCH_JOBS.observe(len(work.outcomes))
            metrics.BATCH_TIME.observe(work.verify_ms / 1000)
            metrics.NEW_TOKENS.inc(sum(outcome.new_tokens for outcome in work.outcomes))
            if len(work.shapes) == 1:
                self._membership.record(Measurement(shape=work.shapes[0], measured_ms=work.verify_ms))
        now_ms = _now_ms()
        of_runs = work.outcomes[len(work.tasks) :]
        if work.copies:
            self.copies.learn(work.runs, work.copies, of_runs)
        for run, outcome in zip(work.runs, of_runs, strict=True):
            self.runs.record(run, outcome, work.verify_ms, now_ms)
        if batch is not None:
            for (job, task), outcome in zip(work.tasks, work.outcomes, strict=False):
                started_run = self.runs.start(job, task, outcome, batch.lease, now_ms)
                if started_run is not None and spans is not None and (round_span := spans.rounds.get(job.session)):
                    self._run_spans.begin(job.session, round_span)
        work.reports = self.runs.due(now_ms, between_steps=True)
        self._reply_soon(work)

    def _reply_soon(self, work: StepWork) -> None:
        if work.batch is None and not work.reports:
            return
        reply = asyncio.create_task(self._reply(work))
        self._replies.add(reply)
        reply.add_done_callback(self._replied)

    def _replied(self, reply: asyncio.Task[None]) -> None:
        """Report the runs that ended while a reply held them back."""
        self._replies.discard(reply)
        self._reply_soon(StepWork(reports=self.runs.due(_now_ms(), between_steps=False)))

    async def _prepare(self, batch: Batch) -> StepWork:
        """Split a batch into jobs for the model, jobs that are refused, and jobs that the commit script answers."""
        self._sessions.touch(batch.jobs)
        work = StepWork(batch)
        valid = []
        for job in batch.jobs:
            if not self._session_keys.accepts(job):
                self._log.error("wrong session key in a job: is WISP_SESSION_SECRET the same?", session=job.session)
                work.failed.append((job, replies.FORBIDDEN))
            elif not self._serves(job):
                work.failed.append((job, replies.wrong_model(job, self._membership.fingerprint)))
            elif self.runs.join(job) is not None:
                # Sent by someone who has missed the run or a report of it: answered with what is committed.
                work.stale.append(job)
            else:
                valid.append(job)
        if batch.batch in self._read:
            self._read.discard(batch.batch)
            await self._sessions.recall(valid)  # what has changed since
        else:
            await self._recall(valid)
        for job in valid:
            if self._sessions.remembers(job):
                work.tasks.append((job, self._sessions.task(job)))
            else:
                work.stale.append(job)
        return work

    def _run_model(self, work: StepWork) -> None:
        """Verify the tasks and decode the runs. Runs in the engine's thread."""
        started = time.perf_counter()
        tasks = [task for _, task in work.tasks] + self._run_tasks(work)
        work.outcomes, work.shapes = verify(self._thread.engine, tasks, digests=self._digests, grammars=self._grammars)
        if self._emulated is not None:
            time.sleep(self._emulated.rest_ms(work.shapes, (time.perf_counter() - started) * 1000) / 1000)
        self._sessions.update_cached(task.session_id for task in tasks)

    def _run_tasks(self, work: StepWork) -> list[VerifyTask]:
        """Return the tasks of the step's runs: with copies if it has no batch, which was planned without them."""
        if work.batch is not None:
            return [run.task for run in work.runs]
        work.copies = self.copies.propose(work.runs, self._thread.engine.free_tokens)
        lengths = self.copies.lengths(work.runs, work.copies)
        return [
            replace(run.task, draft=list(copy.tokens[:length])) if length else run.task
            for run, copy, length in zip(work.runs, work.copies, lengths, strict=True)
        ]

    async def _reply(self, work: StepWork) -> None:
        """Commit, publish the results, and last release what has ended.

        If the lease has ended, nothing is committed or published.
        """
        answering = self._collect(work)
        answers = await self._commit(work, answering.open)
        if answers is None:
            if work.spans is not None:
                work.spans.end()
            return
        if work.spans is not None:
            work.spans.event("committed")
        reported, answers = answers[: len(work.reports)], answers[len(work.reports) :]
        ended = self._apply(answering.open, answers)
        results = []
        for report, answer in zip(work.reports, reported, strict=True):
            ended += self._apply_report(report, answer)
            results.append(answering.reported(report, answer))
        settled = answering.settle(answers)
        await self._publish([*results, *settled])
        self._log.debug("results sent")
        if work.spans is not None:
            work.spans.end(settled)
        if self._run_spans:
            self._run_spans.reported(results, self.runs)
        await self.release(ended)

    def _collect(self, work: StepWork) -> BatchReplies:
        answering = BatchReplies(
            self._membership.verifier_id,
            replies.RUN_BATCH if work.batch is None else work.batch.batch,
            work.verify_ms,
            self._membership.arithmetic,
            self.runs,
            0.0 if work.batch is None else work.batch.predicted_ms,
        )
        for job, failure in work.failed:
            answering.fail(job, failure)
        for job in work.stale:
            answering.ask(job)
        for (job, task), outcome in zip(work.tasks, work.outcomes, strict=False):
            if outcome.error is not None:
                self._log.warning("job refused", session=job.session, error=repr(outcome.error))
            answering.verified(job, task, outcome)
        return answering

    async def _commit(self, work: StepWork, commits: Sequence[OpenCommit]) -> list[Committed] | None:
        """Return the commit script's answers to the step's reports and commits.

        None if Redis is unreachable or the lease has ended.
        """
        # The lease of the grants and not the present one: this process may have been frozen since the step began.
        granted = work.reports[0].run.lease if work.reports else 0
        lease = granted if work.batch is None else work.batch.lease or granted
        try:
            answers = await self._store.commit(
                self._membership.verifier_id,
                [*(report.commit for report in work.reports), *(one.commit for one in commits)],
                lease=lease,
                arithmetic=self._membership.arithmetic,
            )
        except (BrokersError, Fenced) as error:
            # An unreachable Redis may have committed or not. The drafters send the rounds again, and the script
            # answers with what is committed.
            self._log.warning("results dropped", error=str(error))
            lost = [one.job.session for one in commits] + [report.commit.session for report in work.reports]
            self.runs.release(lost)
            for session_id in lost:
                self._sessions.drop(session_id)
            return None
        self._log.debug("batch committed")
        return answers

    def _apply(self, commits: Sequence[OpenCommit], answers: Sequence[Committed]) -> list[str]:
        """Update the sessions from the answers; return those that have ended."""
        ended = []
        for one, answer in zip(commits, answers, strict=True):
            session_id = one.job.session
            run = self.runs.get(session_id)
            if answer.ended:
                ended.append(session_id)
            elif self._sessions.apply(session_id, answer):
                self._handoff.on_commit(session_id, self._sessions.tokens(session_id))
                if run is not None:
                    run.confirmed = True
            elif run is None or not run.confirmed:
                self.runs.release([session_id])
                self._sessions.drop(session_id)
        return ended

    def _apply_report(self, report: RunReport, answer: Committed) -> list[str]:
        """Update a run and its session from the answer to a report; return the session if it has ended."""
        session_id = report.commit.session
        if answer.ended:
            self.runs.drop(report.run)
            return [session_id]
        if self._sessions.apply(session_id, answer):
            self._handoff.on_commit(session_id, self._sessions.tokens(session_id))
            self.runs.reported(report)
        else:
            # Somebody else has committed tokens of this session.
            self.runs.drop(report.run)
            self._sessions.drop(session_id)
        return []

    async def release(self, session_ids: Sequence[str]) -> None:
        """Forget sessions that have ended or moved, with their runs, and release their KV."""
        self.runs.release(session_ids)
        await self._sessions.release(session_ids)

    async def _publish(self, answers: Sequence[JobReply]) -> None:
        """Publish each result once; the broker makes the copies for drafter, gateway and scheduler.

        Results with the same receivers go together.
        """
        for group in replies.groups(answers):
            for reply in group:
                metrics.count_tokens(reply.result)
                if reply.result.error is not None:
                    metrics.JOBS_REFUSED.labels(reply.result.error.code).inc()
                for states in reply.hidden:
                    metrics.HIDDEN_BYTES.inc(len(states.rows) + len(states.scales))
                    await self._broker.publish(states, topology.result(reply.job.drafter))
            receivers = (*map(topology.result, group[0].receivers), topology.RESULT_SCHEDULER)
            await self._broker.publish_group([reply.result for reply in group], receivers[0], cc=receivers[1:])


def _now_ms() -> float:
    return time.monotonic() * 1000
