"""The drafter's loop: one coroutine per session, drafting together what is ready together."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import structlog

from services.drafter import metrics
from services.drafter.session import DraftSession
from services.drafter.settings import DrafterSettings
from services.drafter.sources import Draft, DraftRequest, DraftSource, LookupDrafts, NoDrafts
from services.drafter.timeout import RoundTimer
from shared import logging, topology
from shared.broker import Broker
from shared.errors import BrokersError
from shared.messages import Cancel, DraftChoice, Generate, Load, Message, Result
from shared.models.folder import ModelFolder
from shared.service import running
from shared.store import SessionStatus, Store
from shared.topology import Topology

STORE_RETRY_S = 1.0


async def serve(settings: DrafterSettings, instance: str, stop: asyncio.Event) -> None:
    """Run a drafter until `stop` is set; its unfinished sessions are then given to other drafters by the broker."""
    sources: dict[str, DraftSource] = {source.name: source for source in (NoDrafts(), LookupDrafts())}
    vocab_fingerprint = None
    if settings.draft_model is not None:
        folder = ModelFolder(settings.draft_model)
        vocab_fingerprint = folder.vocab_fingerprint
        sources["model"] = await asyncio.to_thread(_load_model_drafts, settings)
    broker = await Broker.connect(settings.amqp_url, Topology(settings.namespace), instance)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s)
    drafter = Drafter(instance, settings, sources, vocab_fingerprint, broker, store)
    try:
        await drafter.run(stop)
    finally:
        await broker.close()
        await store.close()


def _load_model_drafts(settings: DrafterSettings) -> DraftSource:
    # torch is needed for this source alone; a drafter on a thin device can do without it.
    from services.drafter.sources.model import ModelDrafts
    from shared.engine import Engine

    assert settings.draft_model is not None
    engine = Engine(
        settings.draft_model,
        dtype=settings.draft_dtype,
        device=settings.device,
        threads=settings.threads,
        budget_tokens=settings.cache_tokens,
    )
    return ModelDrafts(engine)


class SourceWorker:
    """Calls one draft source for all sessions that are ready; those that come meanwhile make up the next call."""

    def __init__(self, source: DraftSource) -> None:
        self.source = source
        self._waiting: list[tuple[DraftRequest, asyncio.Future[Draft]]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"draft-{source.name}") if source.blocking else None

    async def draft(self, request: DraftRequest) -> Draft:
        """The session's draft, made in one call with those of others."""
        if self._thread is None:
            return self.source.propose([request])[0]
        answer: asyncio.Future[Draft] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._arrived.set()
        return await answer

    async def work(self) -> None:
        """Serve `draft` forever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            waiting, self._waiting = self._waiting, []
            requests = [request for request, _ in waiting]
            try:
                drafts = await loop.run_in_executor(self._thread, self.source.propose, requests)
            except Exception:
                # Drafts only make it faster: without them the text is the same.
                logging.get().exception("draft source failed", source=self.source.name)
                drafts = [Draft() for _ in requests]
            for (_, answer), draft in zip(waiting, drafts, strict=True):
                if not answer.done():
                    answer.set_result(draft)

    def close(self, session: str) -> None:
        """Forget a session, in the thread that the source lives in."""
        if self._thread is None:
            self.source.close(session)
        else:
            self._thread.submit(self.source.close, session)


class Drafter:
    """Takes requests from its pool and sees each through."""

    def __init__(
        self,
        instance: str,
        settings: DrafterSettings,
        sources: dict[str, DraftSource],
        vocab_fingerprint: str | None,
        broker: Broker,
        store: Store,
    ) -> None:
        self.instance = instance
        self._settings = settings
        self._workers = {name: SourceWorker(source) for name, source in sources.items()}
        self._vocab_fingerprint = vocab_fingerprint
        self._broker = broker
        self._store = store
        self._log = logging.get()
        self._results: dict[str, asyncio.Queue[Result | Cancel]] = {}
        self._served: dict[str, asyncio.Event] = {}
        self._first_rounds = RoundTimer(settings.min_timeout_ms)
        self._later_rounds = RoundTimer(settings.min_timeout_ms)
        self._draft_cap = settings.draft_length

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        names = self._broker.topology
        own = (topology.result(self.instance), topology.CANCEL, topology.LOAD)
        await self._broker.consume(names.own_queue("drafter", self.instance, own), self._receive)
        await self._broker.consume(
            names.generate_queue(self._settings.pool), self._generate, prefetch=self._settings.max_sessions
        )
        self._log.info("ready", pool=self._settings.pool, sources=sorted(self._workers))
        async with running(stop, *(worker.work() for worker in self._workers.values())):
            pass

    async def _receive(self, message: Message) -> None:
        if isinstance(message, Load):
            self._draft_cap = message.draft_cap
        elif isinstance(message, Result | Cancel) and (waiting := self._results.get(message.session)):
            waiting.put_nowait(message)

    async def _generate(self, message: Message) -> None:
        if not isinstance(message, Generate):
            return
        if (served := self._served.get(message.session)) is not None:
            # Delivered again after a reconnect. Acknowledging this copy before the end would lose the request if this
            # process died meanwhile.
            await served.wait()
            return
        self._served[message.session] = asyncio.Event()
        self._results[message.session] = asyncio.Queue()
        worker = self._worker(message)
        try:
            with metrics.SESSIONS.track_inprogress():
                await self._serve(message, worker)
        finally:
            self._served.pop(message.session).set()
            del self._results[message.session]
            worker.close(message.session)

    def _worker(self, generate: Generate) -> SourceWorker:
        """The draft source that a request gets: what it asks for where that can be had."""
        wanted = self._settings.draft_source if generate.draft is DraftChoice.AUTO else generate.draft.value
        if wanted == "model":
            if wanted not in self._workers:
                self._log.warning("no draft model here; using the default source", session=generate.session)
                wanted = self._settings.draft_source
            elif self._vocab_fingerprint != generate.vocab_fingerprint:
                self._log.warning(
                    "the draft model's vocabulary is not the target's; decoding without drafts",
                    session=generate.session,
                    draft_vocabulary=self._vocab_fingerprint,
                    target_vocabulary=generate.vocab_fingerprint,
                )
                wanted = "none"
        return self._workers[wanted]

    async def _serve(self, generate: Generate, worker: SourceWorker) -> None:
        started = time.monotonic()
        while True:
            try:
                stored = (await self._store.read([generate.session]))[0]
                break
            except BrokersError as error:
                self._log.warning("waiting for Redis", error=str(error))
                await asyncio.sleep(STORE_RETRY_S)
        if stored is None or stored.status is not SessionStatus.ACTIVE:
            self._log.info("nothing to do", status=stored.status if stored else "gone")
            return
        session = DraftSession(generate, stored.tokens, round=stored.round + 1)
        prior_ms = max(stored.elapsed_ms, generate.elapsed_ms)
        while not session.done:
            with structlog.contextvars.bound_contextvars(round=session.round):
                elapsed_ms = prior_ms + (time.monotonic() - started) * 1000
                if not await self._round(session, worker, elapsed_ms):
                    return
        if session.failure is not None:
            self._log.warning("session failed", code=session.failure.code, error=session.failure.message)

    async def _round(self, session: DraftSession, worker: SourceWorker, elapsed_ms: float) -> bool:
        """Draft, have it verified, take the result in; False when the session was cancelled."""
        started = time.monotonic()
        room = session.draft_room(min(self._settings.draft_length, self._draft_cap))
        request = DraftRequest(session.name, session.tokens, room, session.generate.sampling)
        draft = await worker.draft(request)
        draft_ms = (time.monotonic() - started) * 1000
        metrics.DRAFT_TIME.observe(draft_ms / 1000)
        timer = self._first_rounds if session.output_tokens == 0 else self._later_rounds
        attempt = 0
        while True:
            sent = time.monotonic()
            verify = session.verify(
                draft.tokens,
                draft.acceptance,
                self.instance,
                elapsed_ms + (sent - started) * 1000,
                draft_ms,
                attempt,
            )
            self._log.debug("round sent", draft=len(verify.draft), attempt=attempt)
            await self._broker.publish(verify, topology.VERIFY)
            result = await self._result(session, timer.timeout_ms(attempt) / 1000)
            if result is not None:
                break
            attempt += 1
            metrics.ROUNDS_RESENT.inc()
            self._log.info("round is late, sending it again", attempt=attempt)
        if isinstance(result, Cancel):
            return False
        self._log.debug("round settled", status=result.status, accepted=result.accepted, tokens=len(result.tokens))
        metrics.ROUND_TIME.observe(time.monotonic() - sent)
        if attempt == 0:
            timer.learn((time.monotonic() - sent) * 1000)
        worker.source.learn(session.name, result.trimmed_to, result.accepted)
        return True

    async def _result(self, session: DraftSession, timeout_s: float) -> Result | Cancel | None:
        """The message that settles the round in flight; None when it does not come in time."""
        inbox = self._results[session.name]
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await inbox.get()
                    if isinstance(message, Cancel) or session.apply(message):
                        return message
        except TimeoutError:
            return None
