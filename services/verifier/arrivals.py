"""Batches that have arrived: the sessions of their jobs are read while the model computes earlier steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from services.verifier.core import replies
from services.verifier.core.runs import RunTable
from services.verifier.handoff import Handoff
from services.verifier.job_spans import BatchSpans
from services.verifier.membership import Membership
from services.verifier.sessions import SessionTable
from services.verifier.steps import StepWork
from shared.broker.session_keys import SessionKeys
from shared.errors import BrokersError
from shared.messages import Batch, Job, features_of, model_of
from shared.runtime import logging, tracing


class Arrivals:
    """Turns batches into work for the model, in the order of their arrival."""

    def __init__(
        self,
        membership: Membership,
        sessions: SessionTable,
        handoff: Handoff,
        session_keys: SessionKeys,
        runs: RunTable,
        ready: Callable[[StepWork], None],
    ) -> None:
        """ready: takes each batch whose sessions are read."""
        self._membership = membership
        self._sessions = sessions
        self._handoff = handoff
        self._session_keys = session_keys
        self._runs = runs
        self._ready = ready
        self._batches: asyncio.Queue[tuple[Batch, BatchSpans | None]] = asyncio.Queue()
        self._reading = False
        self._log = logging.get()

    @property
    def idle(self) -> bool:
        """True if no batch waits here."""
        return not self._reading and self._batches.empty()

    def put(self, batch: Batch) -> None:
        """Accept a batch."""
        self._log.debug("batch received", batch=batch.batch, jobs=[[job.session, job.round] for job in batch.jobs])
        spans = BatchSpans.begin(batch, self._membership.verifier_id) if tracing.is_on() else None
        self._batches.put_nowait((batch, spans if spans is not None and spans.jobs else None))

    async def run(self) -> None:
        """Read the sessions of each batch, for ever."""
        while True:
            batch, spans = await self._batches.get()
            self._reading = True
            with structlog.contextvars.bound_contextvars(batch=batch.batch):
                if (work := await self._read(batch)) is not None:
                    work.spans = spans
                    self._ready(work)
                elif spans is not None:
                    spans.end()
            self._reading = False

    async def _read(self, batch: Batch) -> StepWork | None:
        """Return a batch as work for the model; None if it is dropped, as its sessions could not be read twice."""
        try:
            return await self._prepare(batch)
        except Exception as error:
            # Beside runs there is time for a second try. Preparing a batch again changes nothing.
            self._log.warning(
                "sessions not read, trying once more", error=str(error), exc_info=not isinstance(error, BrokersError)
            )
        try:
            return await self._prepare(batch)
        except BrokersError as error:
            # Nothing was committed: the drafters' round timeouts send these rounds again.
            self._log.warning("batch dropped", error=str(error))
            return None

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
            elif self._runs.join(job) is not None:
                # Sent by someone who has missed the run or a report of it: answered with what is committed.
                work.stale.append(job)
            else:
                valid.append(job)
        await self._recall(valid)
        for job in valid:
            if self._sessions.remembers(job):
                work.tasks.append((job, self._sessions.task(job)))
            else:
                work.stale.append(job)
        return work

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
