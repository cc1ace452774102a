"""The steps of the model: each computes a batch that has arrived, and the next token of every run.

A step chooses its input only when it begins, in the engine's thread. So one step can wait behind another, and the
thread goes from one to the next without the event loop, which commits and reports the one before meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

from services.verifier.core.copies import ProposedCopy, RunCopies
from services.verifier.core.emulation import EmulatedCost
from services.verifier.core.runs import Run, RunReport
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.engine_thread import EngineThread
from services.verifier.job_spans import BatchSpans
from services.verifier.membership import Membership
from services.verifier.sessions import SessionTable
from services.verifier.shared_runs import SharedRunTable
from services.verifier.verify import verify
from shared.grammar.masks import Grammars
from shared.messages import Batch, BatchShape, Failure, Job
from shared.runtime import logging


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
    started: list[Job] = field(default_factory=list)
    """Jobs whose sessions go on in a run after this step."""
    copies: list[ProposedCopy] = field(default_factory=list)
    """Tokens that each run may copy in this step; empty beside a batch."""
    reports: list[RunReport] = field(default_factory=list)
    """Tokens of runs to commit with this step."""
    outcomes: list[VerifyOutcome] = field(default_factory=list)
    """Outcome of each task, then of each run."""
    shapes: list[BatchShape] = field(default_factory=list)
    """Shape of each forward pass."""
    verify_ms: float = 0.0
    fenced: bool = False
    """True if the batch's lease has ended: it is dropped."""
    spans: BatchSpans | None = None
    """Spans of the batch's traced jobs; None if it has none."""

    def event(self, name: str) -> None:
        """Add an event to the spans."""
        if self.spans is not None:
            self.spans.event(name)


class ModelSteps:
    """Computes steps in the engine's thread."""

    def __init__(
        self,
        sessions: SessionTable,
        engine_thread: EngineThread,
        membership: Membership,
        *,
        grammars: Grammars | None,
        emulated: EmulatedCost | None,
        digests: bool,
    ) -> None:
        """emulated: makes steps take longer. digests: outcomes carry digests of the logits."""
        self._sessions = sessions
        self._engine = engine_thread.engine
        self._membership = membership
        self._grammars = grammars
        self._emulated = emulated
        self._digests = digests
        self._log = logging.get()
        self.ready: deque[StepWork] = deque()
        """Batches whose sessions are read, the next one first. The event loop adds to it, and steps take from it."""
        self.runs = SharedRunTable(digests=digests)
        """The sessions that decode without rounds."""
        self.copies = RunCopies()

    @property
    def wanted(self) -> bool:
        """True if there is something to compute for another step."""
        return bool(self.ready) or self.runs.decoding

    def compute(self) -> StepWork:
        """Compute a step with what there is when it begins: the next batch that is ready, and all runs.

        Runs in the engine's thread.
        """
        work = self.ready.popleft() if self.ready else StepWork()
        if work.batch is not None:
            work.fenced = self._membership.is_fenced(work.batch.lease)
            if work.fenced:
                return work
            self._keep_valid(work)
        work.runs = self.runs.step(self._membership.lease, _now_ms())
        if work.tasks or work.runs:
            self._run_model(work)
        now_ms = _now_ms()
        of_runs = work.outcomes[len(work.tasks) :]
        if work.copies:
            self.copies.learn(work.runs, work.copies, of_runs)
        for run, outcome in zip(work.runs, of_runs, strict=True):
            self.runs.record(run, outcome, work.verify_ms, now_ms)
        if work.batch is not None:
            for (job, task), outcome in zip(work.tasks, work.outcomes, strict=False):
                if self.runs.start(job, task, outcome, work.batch.lease, now_ms) is not None:
                    work.started.append(job)
        work.reports = self.runs.due(now_ms, between_steps=True)
        return work

    def _keep_valid(self, work: StepWork) -> None:
        """Leave jobs to the commit script whose session has got a run or another length since the batch arrived."""
        for job, _ in work.tasks:
            if self.runs.join(job) is not None or not self._sessions.remembers(job):
                work.stale.append(job)
        overtaken = {job.session for job in work.stale}
        work.tasks = [(job, task) for job, task in work.tasks if job.session not in overtaken]

    def _run_model(self, work: StepWork) -> None:
        """Verify the tasks and decode the runs."""
        batch = None if work.batch is None else work.batch.batch
        self._log.debug("model started", batch=batch)
        work.event("model started")
        started = time.perf_counter()
        tasks = [task for _, task in work.tasks] + self._run_tasks(work)
        work.outcomes, work.shapes = verify(self._engine, tasks, digests=self._digests, grammars=self._grammars)
        if self._emulated is not None:
            time.sleep(self._emulated.rest_ms(work.shapes, (time.perf_counter() - started) * 1000) / 1000)
        self._sessions.update_cached(task.session_id for task in tasks)
        work.verify_ms = (time.perf_counter() - started) * 1000
        work.event("model done")
        self._log.debug("model done", batch=batch)

    def _run_tasks(self, work: StepWork) -> list[VerifyTask]:
        """Return the tasks of the step's runs: with copies if it has no batch, which was planned without them."""
        if work.batch is not None:
            return [run.task for run in work.runs]
        work.copies = self.copies.propose(work.runs, self._engine.free_tokens)
        lengths = self.copies.lengths(work.runs, work.copies)
        return [
            replace(run.task, draft=list(copy.tokens[:length])) if length else run.task
            for run, copy, length in zip(work.runs, work.copies, lengths, strict=True)
        ]


def _now_ms() -> float:
    return time.monotonic() * 1000
