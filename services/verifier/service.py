"""The verifier's process: loads the target model, joins the fleet, verifies batches and drains at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from services.verifier.batches import BatchLoop
from services.verifier.core.emulation import EmulatedCost
from services.verifier.engine_thread import EngineThread, load_engine
from services.verifier.handoff import Handoff
from services.verifier.heartbeat_thread import HeartbeatThread
from services.verifier.membership import Membership
from services.verifier.profile import profile
from services.verifier.sessions import SessionTable
from services.verifier.settings import VerifierSettings
from shared.broker import topology
from shared.broker.client import Broker
from shared.cost.fit import VerifierFit
from shared.grammar.masks import Grammars
from shared.messages import Batch, Cancel, Halt, Measurement, Message, Release
from shared.models.folder import ModelFolder
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.registry import Registry
from shared.state.store import Store
from shared.twin.layout import is_twin

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine

QUIET_S = 0.3
"""Time that a draining verifier waits for batches whose scheduler did not know of it yet."""


async def serve(settings: VerifierSettings, instance: str, stop: asyncio.Event) -> None:
    """Run a verifier until `stop` is set and its accepted batches are done."""
    log = logging.get()
    folder = ModelFolder(settings.target)
    if not is_twin(settings.target):
        folder.require_weights()
    executor = ThreadPoolExecutor(1, thread_name_prefix="model")
    log.info("loading the target model", folder=str(settings.target), dtype=settings.dtype, device=settings.device)
    loop = asyncio.get_running_loop()
    # Not in the event loop, which answers /live: reading all weights of a large model takes minutes.
    fingerprint = await loop.run_in_executor(executor, folder.fingerprint, settings.dtype)
    engine = await loop.run_in_executor(executor, _load_engine, settings)
    if engine.module_code_reason:
        log.warning(
            "the model is computed by transformers' module code, which is slower", reason=engine.module_code_reason
        )
    if not engine.batch_invariant:
        log.warning(
            "bits of logits depend on the batch on this torch device: completions may differ in rare close calls",
            device=settings.device,
        )
    log.info("the target model is loaded", cache_tokens=engine.budget_tokens, gpus=settings.gpus)
    emulated = EmulatedCost(settings.emulated_cost) if settings.emulated_cost else None
    measured: Sequence[Measurement] = ()
    if settings.profile:
        measured = await loop.run_in_executor(executor, profile, engine)
    if emulated is not None:
        log.warning("batches are slowed down to the emulated cost")
        measured = [emulated.slowed(one) for one in measured]
    broker = await Broker.connect(settings.amqp_url, settings.topology, instance, settings.journal_limits, settings.tls)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    thread = EngineThread(engine, executor)
    heartbeats = HeartbeatThread()

    async def connect() -> tuple[Broker, Registry]:
        own = await Broker.connect(settings.amqp_url, settings.topology, f"{instance} heartbeats", tls=settings.tls)
        return own, Registry.connect(settings.redis_url, settings.namespace, settings.tls)

    try:
        await store.refuse_cluster()
        await heartbeats.start(connect)
        try:
            await Verifier(instance, fingerprint, thread, broker, store, heartbeats, settings, emulated).run(
                measured, stop
            )
        finally:
            await heartbeats.close()
    finally:
        await broker.close()
        await store.close()
        executor.shutdown()


def _load_engine(settings: VerifierSettings) -> TargetEngine:
    return load_engine(settings.target, settings, keep_hidden=settings.keep_hidden)


class Verifier:
    """The parts of one verifier, and its life from the first lease to the end of draining."""

    def __init__(
        self,
        verifier_id: str,
        fingerprint: str,
        engine_thread: EngineThread,
        broker: Broker,
        store: Store,
        heartbeats: HeartbeatThread,
        settings: VerifierSettings,
        emulated: EmulatedCost | None,
    ) -> None:
        self._broker = broker
        self._store = store
        self._settings = settings
        grammars = None if is_twin(settings.target) else Grammars.of(ModelFolder(settings.target))
        self._sessions = SessionTable(store, engine_thread, grammars)
        self._handoff = Handoff(
            store.kv,
            engine_thread,
            fingerprint,
            mode=settings.kv_handoff,
            ttl_s=settings.kv_handoff_s,
            limit_bytes=settings.kv_handoff_mb * 10**6,
        )
        self._membership = Membership(
            verifier_id, fingerprint, engine_thread.engine, self._sessions, broker, store, heartbeats
        )
        self._loop = BatchLoop(
            self._membership,
            self._sessions,
            engine_thread,
            self._handoff,
            broker,
            store,
            settings.session_keys,
            grammars=grammars,
            emulated=emulated,
            digests=settings.journal,
        )
        self._log = logging.get()

    async def run(self, measured: Sequence[Measurement], stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain. measured: the start-up profile."""
        try:
            await self._serve(measured, stop)
        except asyncio.CancelledError:  # SIGTERM before the loops run
            await self._membership.leave()
            raise
        await self._membership.leave()

    async def _serve(self, measured: Sequence[Measurement], stop: asyncio.Event) -> None:
        """Join, serve until `stop` is set, and drain."""
        membership = self._membership
        await membership.join()
        keys = (topology.batch(membership.verifier_id), topology.CANCEL)
        await self._broker.consume(
            self._broker.topology.own_queue("verifier", membership.verifier_id, keys), self._receive
        )
        if measured:
            fit = VerifierFit(membership.verifier_id)
            fit.start_from(measured)
            self._handoff.transfer_cost.model = self._loop.copies.model = fit.model()
            await membership.announce_cost(fit.model(), measured)
        HEALTH.watch(self._broker, self._store)
        self._log.info(
            "ready",
            fingerprint=membership.fingerprint,
            arithmetic=membership.arithmetic,
            profiled=len(measured),
        )
        async with running(
            stop,
            self._loop.run(),
            self._loop.read(),
            membership.beat(self._settings.heartbeat_ms / 1000),
            self._sessions.sweep(),
            self._handoff.save_committed(),
        ):
            self._log.info("draining")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain_s):
                    await self._drain()

    async def _drain(self) -> None:
        """Hand the KV over, announce the end, and wait until every accepted batch is replied to."""
        self._loop.runs.close()
        # The KV first, so that it is in Redis when another verifier gets the sessions.
        await self._handoff.save_all(self._sessions.all_tokens())
        await self._membership.start_draining()
        while True:
            await asyncio.sleep(QUIET_S)
            if self._loop.idle:
                return

    async def _receive(self, message: Message) -> None:
        match message:
            case Batch():
                self._loop.put(message)
            case Halt():
                self._loop.runs.halt(message.sessions)
            case Release():
                await self._loop.release(message.sessions)
            case Cancel():
                await self._loop.release([message.session])
