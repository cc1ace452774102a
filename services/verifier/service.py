"""The verifier's loop: batches in, verdicts committed, one result per job out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import structlog

from services.verifier import metrics
from services.verifier.core import replies
from services.verifier.core.emulation import Pace
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.handoff import Handoff
from services.verifier.profile import profile
from services.verifier.settings import VerifierSettings
from services.verifier.verify import verify
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import Topology
from shared.cost.fit import VerifierFit
from shared.engine import Engine
from shared.errors import BrokersError, Fenced
from shared.messages import (
    Batch,
    BatchShape,
    Cancel,
    Failure,
    Heartbeat,
    HiddenStates,
    Job,
    Measurement,
    Message,
    Release,
    Residency,
    Result,
    Sample,
    Status,
)
from shared.models.folder import ModelFolder
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.commits import Commit, CommitOutcome
from shared.state.store import Request, SessionStatus, Store

QUIET_S = 0.3
"""A draining verifier waits this long for batches that were sent before the scheduler knew."""

SWEEP_S = 5.0
"""A session that this verifier holds and has not heard of for so long may have ended unheard."""

KNOWN_LIMIT = 10_000
"""Sessions remembered at most. One that moved away or was abandoned is never heard of again; the oldest go first."""

T = TypeVar("T")


@dataclass
class Known:
    """A session as this verifier last committed or read it."""

    request: Request
    tokens: list[int]


async def serve(settings: VerifierSettings, instance: str, stop: asyncio.Event) -> None:
    """Run a verifier until `stop` is set and its accepted batches are done."""
    log = logging.get()
    folder = ModelFolder(settings.target)
    folder.require_weights()
    fingerprint = folder.fingerprint(settings.dtype)
    model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
    loop = asyncio.get_running_loop()
    log.info("loading the target model", folder=str(settings.target), dtype=settings.dtype, device=settings.device)
    engine = await loop.run_in_executor(
        model_thread,
        lambda: Engine(
            settings.target,
            dtype=settings.dtype,
            device=settings.device,
            threads=settings.threads,
            budget_tokens=settings.cache_tokens,
            keep_hidden=settings.keep_hidden,
        ),
    )
    if not engine.batch_invariant:
        log.warning(
            "bits depend on the batch on this device: a text may differ in rare close calls", device=settings.device
        )
    measured: list[Measurement] = []
    if settings.profile:
        measured = await loop.run_in_executor(model_thread, lambda: list(profile(engine)))
    pace = Pace(settings.emulated_cost) if settings.emulated_cost else None
    if pace is not None:
        log.warning("batches take longer than they need, as emulated_cost says")
        measured = [pace.slowed(one) for one in measured]
    broker = await Broker.connect(
        settings.amqp_url, Topology(settings.namespace), instance, settings.journal_limits, settings.tls
    )
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    verifier = Verifier(
        instance, fingerprint, engine, model_thread, broker, store, settings, pace, settings.session_keys
    )
    try:
        await verifier.run(measured, stop)
    finally:
        await broker.close()
        await store.close()
        model_thread.shutdown()


class Verifier:
    """Runs batches one after the other in the model thread; commits and replies while the next one runs."""

    def __init__(
        self,
        instance: str,
        fingerprint: str,
        engine: Engine,
        model_thread: ThreadPoolExecutor,
        broker: Broker,
        store: Store,
        settings: VerifierSettings,
        pace: Pace | None = None,
        session_keys: SessionKeys | None = None,
    ) -> None:
        self.instance = instance
        self.fingerprint = fingerprint
        self._engine = engine
        self._model_thread = model_thread
        self._broker = broker
        self._store = store
        self._heartbeat_s = settings.heartbeat_ms / 1000
        self._drain_s = settings.drain_s
        self._handoff = Handoff(
            store.kv,
            engine,
            fingerprint,
            self._in_model_thread,
            mode=settings.kv_handoff,
            ttl_s=settings.kv_handoff_s,
            limit_bytes=settings.kv_handoff_mb * 10**6,
        )
        self._digests = settings.journal
        self._pace = pace
        self._session_keys = session_keys or SessionKeys(None)
        self._log = logging.get()
        self._known: dict[str, Known] = {}
        self._cached: dict[str, int] = {}
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._replies: set[asyncio.Task[None]] = set()
        self._measured: list[Measurement] = []
        self._draining = False
        self._busy = False
        self._lease = 0
        self._heard: dict[str, float] = {}
        """When each session that is held was last asked for, in seconds of the monotonic clock."""

    async def run(self, measured: Sequence[Measurement], stop: asyncio.Event) -> None:
        """Serve until `stop`, then finish what was accepted."""
        with suppress(BrokersError):  # the heartbeats go on asking for it
            self._lease = await self._store.renew(self.instance, 0)
        await self._broker.consume(
            self._broker.topology.own_queue(
                "verifier", self.instance, (topology.batch(self.instance), topology.CANCEL)
            ),
            self._receive,
        )
        if measured:
            await self._publish_profile(measured)
        HEALTH.watch(self._broker, self._store)
        self._log.info("ready", fingerprint=self.fingerprint, profiled=len(measured))
        async with running(stop, self._work(), self._beat(), self._sweep(), self._handoff.work()):
            self._log.info("draining")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._drain_s):
                    # First, so that whoever gets the sessions finds their K/V.
                    await self._handoff.leave({session: known.tokens for session, known in self._known.items()})
                    self._draining = True
                    await self._publish_heartbeat()
                    await self._drained()
        with suppress(BrokersError):
            await self._store.silence(self.instance)

    async def _publish_profile(self, measured: Sequence[Measurement]) -> None:
        """Tell the first cost model, fresher than any that is stored, and to an estimator what it was made from."""
        fit = VerifierFit(self.instance)
        fit.start_from(measured)
        model = self._handoff.worth.model = fit.model()
        await self._broker.publish(model, topology.costmodel(self.instance))
        try:
            await self._store.save_cost_model(model)
        except BrokersError as error:
            self._log.warning("cost model not stored", error=str(error))
        profiled = Sample(verifier=self.instance, batches=list(measured), profile=True)
        await self._broker.publish(profiled, topology.SAMPLE)

    async def _drained(self) -> None:
        while True:
            await asyncio.sleep(QUIET_S)
            if self._batches.empty() and not self._busy and not self._replies:
                return

    async def _receive(self, message: Message) -> None:
        if isinstance(message, Batch):
            self._log.debug(
                "batch received", batch=message.batch, jobs=[[job.session, job.round] for job in message.jobs]
            )
            self._batches.put_nowait(message)
        elif isinstance(message, Release):
            await self._forget(message.sessions)
        elif isinstance(message, Cancel):
            await self._forget([message.session])

    async def _work(self) -> None:
        while True:
            batch = await self._batches.get()
            self._busy = True
            with structlog.contextvars.bound_contextvars(batch=batch.batch):
                if self._fenced(batch):
                    self._log.warning("batch of an ended lease dropped", lease=batch.lease)
                else:
                    try:
                        await self._verify(batch)
                    except BrokersError as error:
                        # Nothing was committed: the drafters' round timeouts send these rounds again.
                        self._log.warning("batch dropped", error=str(error))
            self._busy = False

    def _fenced(self, batch: Batch) -> bool:
        """Whether the scheduler sent this before it gave this verifier up for gone."""
        return batch.lease not in (0, self._lease)

    async def _verify(self, batch: Batch) -> None:
        now = time.monotonic()
        self._heard |= {job.session: now for job in batch.jobs}
        work, settled = await self._prepare(batch)
        tasks = [task for _, task in work]
        outcomes: list[VerifyOutcome] = []
        shapes: list[BatchShape] = []
        elapsed_ms = 0.0
        if tasks:
            self._log.debug("model started")
            started = time.perf_counter()
            outcomes, shapes = await self._in_model_thread(lambda: self._run(tasks))
            elapsed_ms = (time.perf_counter() - started) * 1000
            self._log.debug("model done")
            metrics.BATCHES.inc()
            metrics.BATCH_JOBS.observe(len(tasks))
            metrics.BATCH_TIME.observe(elapsed_ms / 1000)
            metrics.NEW_TOKENS.inc(sum(outcome.new_tokens for outcome in outcomes))
        judged = [(job, task, outcome) for (job, task), outcome in zip(work, outcomes, strict=True)]
        reply = asyncio.create_task(self._reply(batch, judged, settled, elapsed_ms, shapes))
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)

    def _run(self, tasks: list[VerifyTask]) -> tuple[list[VerifyOutcome], list[BatchShape]]:
        started = time.perf_counter()
        verified = verify(self._engine, tasks, digests=self._digests)
        if self._pace is not None:
            time.sleep(self._pace.rest_ms(verified[1], (time.perf_counter() - started) * 1000) / 1000)
        held = {session: self._engine.cached(session) for session in {*self._cached, *(t.session_id for t in tasks)}}
        self._cached = {session: cached for session, cached in held.items() if cached}
        return verified

    async def _prepare(self, batch: Batch) -> tuple[list[tuple[Job, VerifyTask]], list[tuple[Job, Failure | None]]]:
        """Split a batch into the jobs that need the model, and those settled by the store, or by a failure at once."""
        work: list[tuple[Job, VerifyTask]] = []
        settled: list[tuple[Job, Failure | None]] = []
        mine = []
        for job in batch.jobs:
            if not self._session_keys.accepts(job):
                self._log.error("job without its session's key: is WISP_SESSION_SECRET the same?", session=job.session)
                settled.append((job, replies.FORBIDDEN))
            elif job.fingerprint == self.fingerprint:
                mine.append(job)
            else:
                settled.append((job, replies.wrong_model(job, self.fingerprint)))
        await self._learn([job for job in mine if not self._knows(job)])
        unheld = [job.session for job in mine if self._knows(job) and not self._cached.get(job.session)]
        await self._handoff.load({session: self._known[session].tokens for session in unheld})
        for job in mine:
            if self._knows(job):
                work.append((job, self._task(job)))
            else:
                # Gone, cancelled, ended, or built on another length: the commit script tells which.
                settled.append((job, None))
        return work, settled

    def _knows(self, job: Job) -> bool:
        known = self._known.get(job.session)
        return known is not None and len(known.tokens) == job.base_len

    async def _learn(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job, session in zip(jobs, await self._store.read([job.session for job in jobs]), strict=True):
            if session is not None and session.status is SessionStatus.ACTIVE:
                self._known[job.session] = Known(session.request, session.tokens)
            else:
                self._known.pop(job.session, None)
        while len(self._known) > KNOWN_LIMIT:
            del self._known[next(iter(self._known))]

    def _task(self, job: Job) -> VerifyTask:
        known = self._known[job.session]
        return VerifyTask(
            session_id=job.session,
            # A copy: the reply to an earlier batch may extend the session while the model still works on this one.
            tokens=list(known.tokens),
            draft=job.draft,
            sampling=known.request.sampling,
            stop_ids=frozenset(known.request.stop_ids),
            room=known.request.max_length - len(known.tokens),
            prefill_to=job.prefill_to,
            hidden_from=job.hidden_from,
            hidden_format=job.hidden_format,
        )

    async def _reply(
        self,
        sent: Batch,
        judged: Sequence[tuple[Job, VerifyTask, VerifyOutcome]],
        settled: Sequence[tuple[Job, Failure | None]],
        verify_ms: float,
        shapes: Sequence[BatchShape],
    ) -> None:
        """Commit, publish the results, and last free what nobody needs any more.

        Whoever has lost the lease does neither.
        """
        batch = sent.batch
        results: list[tuple[Job, Result, list[HiddenStates]]] = [
            (job, replies.failed(job, self.instance, batch, failure), []) for job, failure in settled if failure
        ]
        commits: list[tuple[Job, VerifyOutcome | None, Commit]] = []
        commits += [
            (job, None, Commit(job.session, job.round, job.base_len, 0, (), None, 0))
            for job, failure in settled
            if failure is None
        ]
        for job, task, judgement in judged:
            if judgement.error is not None:
                self._log.warning("job refused", session=job.session, error=repr(judgement.error))
                results.append((job, replies.failed(job, self.instance, batch, replies.refused(judgement.error)), []))
            elif judgement.verdict is None:
                results.append((job, replies.prefilled(job, self.instance, batch, judgement, verify_ms), []))
            else:
                v = judgement.verdict
                commit = Commit(
                    job.session, job.round, len(task.tokens), v.accepted, v.tokens, v.finish, judgement.cached
                )
                commits.append((job, judgement, commit))
        try:
            answers = await self._store.commit(self.instance, [commit for _, _, commit in commits], lease=sent.lease)
        except (BrokersError, Fenced) as error:
            # Where Redis is away, whether it was committed is unknown. The rounds come again, and the script will say.
            self._log.warning("results dropped", batch=batch, error=str(error))
            for job, _, _ in commits:
                self._known.pop(job.session, None)
            return
        self._log.debug("batch committed", batch=batch)
        ended = []
        for (job, outcome, _), answer in zip(commits, answers, strict=True):
            result = replies.settled(job, self.instance, batch, outcome, answer, verify_ms)
            results.append((job, result, replies.hidden_states(job, outcome, answer)))
            known = self._known.get(job.session)
            if answer.finish is not None or answer.outcome in (CommitOutcome.CANCELLED, CommitOutcome.GONE):
                ended.append(job.session)
            elif answer.outcome is CommitOutcome.COMMITTED and known is not None:
                known.tokens[answer.base_len :] = answer.tokens
                self._handoff.committed(job.session, known.tokens)
            else:
                self._known.pop(job.session, None)
        # A prompt's hidden states are megabytes: they go last, so that no other session's result waits behind them.
        for job, result, hidden in sorted(results, key=lambda reply: sum(states.count for states in reply[2])):
            if result.error is not None:
                metrics.JOBS_REFUSED.labels(result.error.code).inc()
            for states in hidden:
                metrics.HIDDEN_BYTES.inc(len(states.rows) + len(states.scales))
                await self._broker.publish(states, topology.result(job.drafter))
            await self._publish(job, result)
        self._log.debug("results sent", batch=batch)
        await self._forget(ended)
        if len(shapes) == 1:
            self._measured.append(Measurement(shape=shapes[0], measured_ms=verify_ms))

    async def _publish(self, job: Job, result: Result) -> None:
        # One publish; the broker makes the copies. The scheduler alone is told of a finished chunk of prefill, and of a
        # job that nobody may have asked for.
        if result.status is Status.PREFILLED or result.error == replies.FORBIDDEN:
            await self._broker.publish(result, topology.RESULT_SCHEDULER)
        else:
            others = (topology.result(job.gateway), topology.RESULT_SCHEDULER)
            await self._broker.publish(result, topology.result(job.drafter), cc=others)

    async def _forget(self, sessions: Sequence[str]) -> None:
        gone = [session for session in sessions if session in self._cached or session in self._known]
        if not gone:
            return
        for session in gone:
            self._known.pop(session, None)

        def release() -> None:
            for session in gone:
                self._engine.release(session)
            # Replaced, not changed: the event loop may be reading it.
            self._cached = {s: cached for s, cached in self._cached.items() if s not in gone}

        await self._in_model_thread(release)

    async def _in_model_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, work)

    async def _beat(self) -> None:
        while True:
            await self._publish_heartbeat()
            if self._measured:
                batches, self._measured = self._measured, []
                await self._broker.publish(Sample(verifier=self.instance, batches=batches), topology.SAMPLE)
            await asyncio.sleep(self._heartbeat_s)

    async def _sweep(self) -> None:
        """Free what sessions hold that have ended while this verifier, or its link to RabbitMQ, was away."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            self._heard = {session: at for session, at in self._heard.items() if session in self._cached}
            silent = [session for session in self._cached if now - self._heard.setdefault(session, now) >= SWEEP_S]
            if silent:
                with suppress(BrokersError):  # asked again in a while
                    await self._forget(await self._store.ended(silent))

    async def _publish_heartbeat(self) -> None:
        heartbeat = Heartbeat(
            verifier=self.instance,
            fingerprint=self.fingerprint,
            max_len=min(self._engine.max_len, self._engine.budget_tokens),
            free_tokens=self._engine.free_tokens,
            total_tokens=self._engine.budget_tokens,
            lease=self._lease,
            draining=self._draining,
            residency=[Residency(session=s, cached=c) for s, c in self._cached.items()],
        )
        metrics.CACHE_USAGE.set(1 - heartbeat.free_tokens / heartbeat.total_tokens)
        await self._broker.publish(heartbeat, topology.heartbeat(self.instance))
        try:
            lease = await self._store.renew(self.instance, self._lease)
            await self._store.beat(heartbeat.model_copy(update={"lease": lease}))
        except BrokersError as error:
            self._log.warning("heartbeat not stored", error=str(error))
            return
        if lease != self._lease:
            if self._lease:
                self._log.warning("away for too long: what was sent here before is not worked on", lease=lease)
            self._lease = lease
            await self._publish_heartbeat()
