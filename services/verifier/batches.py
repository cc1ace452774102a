"""The verifier's loop: step after step through the model, each with the next batch and the next token of every run.

A step without a batch serves the runs alone; without runs the loop waits for a batch. While one step computes, the next
one waits behind it, so that the model's thread never waits for the event loop; and the one before is committed and
replied to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import structlog

from services.verifier import metrics
from services.verifier.arrivals import Arrivals
from services.verifier.core.emulation import EmulatedCost
from services.verifier.engine_thread import EngineThread
from services.verifier.handoff import Handoff
from services.verifier.membership import Membership
from services.verifier.replying import Replying
from services.verifier.sessions import SessionTable
from services.verifier.steps import ModelSteps, StepWork
from shared.broker.client import Broker
from shared.broker.session_keys import SessionKeys
from shared.grammar.masks import Grammars
from shared.messages import Batch, Measurement
from shared.runtime import logging
from shared.state.store import Store

IDLE_S = 1.0
"""Without a batch for this long, the verifier checks its KV cache."""
STEPS_AHEAD = 2
"""Most steps that the model's thread has at once: one that it computes, and one that follows without a pause."""


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
        self._model = ModelSteps(
            sessions, engine_thread, membership, grammars=grammars, emulated=emulated, digests=digests
        )
        self.runs = self._model.runs
        """The sessions that decode without rounds."""
        self.copies = self._model.copies
        self._replying = Replying(membership, sessions, self.runs, handoff, broker, store)
        self._arrivals = Arrivals(membership, sessions, handoff, session_keys, self.runs, self._ready)
        self._steps: deque[asyncio.Future[StepWork]] = deque()
        """Steps that the thread has to compute, in order; the first one may have begun."""
        self._wake = asyncio.Event()
        self._unchecked = False
        """True if a step has run since the last check of the KV cache."""
        self._log = logging.get()

    @property
    def idle(self) -> bool:
        """True if every accepted batch is replied to and no run goes on."""
        return not (self._steps or self._model.ready or self.runs) and self._arrivals.idle and self._replying.idle

    def put(self, batch: Batch) -> None:
        """Accept a batch."""
        self._arrivals.put(batch)

    async def read(self) -> None:
        """Prepare the batches that arrive, for ever."""
        await self._arrivals.run()

    async def release(self, session_ids: Sequence[str]) -> None:
        """Forget sessions that have ended or moved, with their runs, and release their KV."""
        await self._replying.release(session_ids)

    async def run(self) -> None:
        """Compute and reply, for ever."""
        while True:
            self._begin_steps()
            if not self._steps:
                await self._wait()
                continue
            work = await self._steps[0]
            self._steps.popleft()
            # The next step must not wait for what follows this one.
            self._begin_steps()
            self._finish(work)

    def _ready(self, work: StepWork) -> None:
        self._model.ready.append(work)
        self._begin_steps()
        self._wake.set()

    def _begin_steps(self) -> None:
        while len(self._steps) < STEPS_AHEAD and self._model.wanted:
            self._steps.append(self._thread.step(self._model.compute))

    async def _wait(self) -> None:
        """Wait for a batch. Once in each idle time, check the KV cache."""
        self._wake.clear()
        if self._unchecked:
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._wake.wait()
                    return
            await self._sessions.check_integrity()
            self._unchecked = False
            return
        await self._wake.wait()

    def _finish(self, work: StepWork) -> None:
        """Count a step that has been computed, and let it be replied to."""
        batch = work.batch
        if work.fenced and batch is not None:
            self._log.warning("batch of an ended lease dropped", batch=batch.batch, lease=batch.lease)
            if work.spans is not None:
                work.spans.end()
            return
        if work.outcomes:
            self._unchecked = True
            metrics.BATCHES.inc()
            metrics.BATCH_JOBS.observe(len(work.outcomes))
            metrics.BATCH_TIME.observe(work.verify_ms / 1000)
            metrics.NEW_TOKENS.inc(sum(outcome.new_tokens for outcome in work.outcomes))
            if len(work.shapes) == 1:
                self._membership.record(Measurement(shape=work.shapes[0], measured_ms=work.verify_ms))
        with structlog.contextvars.bound_contextvars(**({} if batch is None else {"batch": batch.batch})):
            self._replying.reply_soon(work)
