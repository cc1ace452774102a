"""The scheduler's process: passes messages to the dispatcher and sends the batches that it returns."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from typing import Any

from services.scheduler import metrics
from services.scheduler.core.dispatch import Dispatcher
from services.scheduler.device_queues import DeviceQueues
from services.scheduler.queue_spans import QueueSpans
from services.scheduler.settings import SchedulerSettings
from services.scheduler.stand_in import StandIn
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.session_keys import SessionKeys
from shared.errors import BrokersError, MessageError
from shared.messages import Batch, Cancel, CostModel, Halt, Heartbeat, Message, Release, Result, Status, Verify
from shared.runtime import logging, tracing
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.registry import Registry
from shared.state.store import Store

IDLE_S = 0.25
"""Longest time between two decisions, so that silent verifiers and lost batches are noticed."""
PAUSE_MS = 1000.0
"""A longer time between two decisions is a pause: the machine or this process stood still."""


def now_ms() -> float:
    """Return this process's monotonic clock, in milliseconds."""
    return time.monotonic() * 1000


async def serve(settings: SchedulerSettings, instance: str, stop: asyncio.Event) -> None:
    """Run a scheduler until `stop` is set. The drafters send pending rounds again, to another scheduler."""
    broker = await Broker.connect(settings.amqp_url, settings.topology, instance, settings.journal_limits, settings.tls)
    registry = Registry.connect(settings.redis_url, settings.namespace, tls=settings.tls)
    dispatcher = Dispatcher(instance, settings.rules)
    store = Store.connect(settings.redis_url, settings.namespace, tls=settings.tls)
    stand_in = None
    if settings.stand_in_pools:
        stand_in = StandIn(instance, settings.stand_in_pools, settings.stand_in_sessions, broker, store)
    scheduler = Scheduler(dispatcher, broker, settings.session_keys, stand_in)
    devices = None
    if settings.devices_file is not None:
        devices = DeviceQueues(
            settings.devices_file,
            broker,
            scheduler.take,
            scheduler.due_ms,
            settings.session_keys,
            settings.device_rounds_per_s,
        )
    try:
        await registry.refuse_cluster()
        await scheduler.recall(registry)
        await scheduler.run(registry, stop, settings.load_ms / 1000, devices)
    finally:
        await broker.close()
        await registry.close()
        await store.close()


class Scheduler:
    """Connects the dispatcher with the broker."""

    def __init__(
        self, dispatcher: Dispatcher, broker: Broker, session_keys: SessionKeys, stand_in: StandIn | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._broker = broker
        self._session_keys = session_keys
        self._stand_in = stand_in
        self._timer: asyncio.TimerHandle | None = None
        self._decided_ms = math.inf
        self._sending: set[asyncio.Task[None]] = set()
        self._spans = QueueSpans()
        self._log = logging.get()

    async def recall(self, registry: Registry) -> None:
        """Load the cost models and heartbeats that Redis holds."""
        try:
            for model in await registry.cost_models():
                self._dispatcher.on_cost_model(model, now_ms())
            for heartbeat in await registry.heartbeats():
                self._dispatcher.on_heartbeat(heartbeat, now_ms())
        except BrokersError as error:
            self._log.warning("starting without the stored cost models", error=str(error))

    async def run(
        self, registry: Registry, stop: asyncio.Event, load_s: float, devices: DeviceQueues | None = None
    ) -> None:
        """Serve until `stop` is set."""
        names = self._broker.topology
        own = (topology.RESULT_SCHEDULER, topology.heartbeat("*"), topology.costmodel("*"), topology.CANCEL)
        await self._broker.consume(names.own_queue("scheduler", self._dispatcher.scheduler_id, own), self._receive)
        await self._broker.consume(names.verify_queue(), self._receive_round)
        loops = [self._publish_load(load_s)]
        if devices is not None:
            await devices.follow()
            loops.append(devices.watch())
        if self._stand_in is not None:
            loops += await self._stand_in.join()
            HEALTH.notes = self._stand_in.notes
        HEALTH.watch(self._broker, registry)
        self._log.info("ready", policy=self._dispatcher.rules.policy)
        self._decide()
        async with running(stop, *loops):
            pass
        if self._timer is not None:
            self._timer.cancel()

    async def _receive_round(self, message: Message) -> None:
        """Handle a message from the queue of rounds. Any other type than `Verify` is an error of the sender."""
        if not isinstance(message, Verify):
            raise MessageError(f"a {message.type_name} is no round")
        if not self._session_keys.accepts(message):
            metrics.ROUNDS_REFUSED.labels("").inc()
            self._log.warning("round refused: its session key is wrong or missing", drafter=message.drafter)
            return
        self.take(message)

    def due_ms(self, session_id: str) -> float | None:
        """Return when a session's next token is due, as predicted by this scheduler; None if unknown."""
        session = self._dispatcher.fleet.sessions.get(session_id)
        return None if session is None else session.due_ms

    def take(self, message: Verify) -> None:
        """Pool a validated round."""
        self._log.debug("round received", round=message.round, slack_ms=message.slack_ms)
        if tracing.is_on():
            self._spans.arrived(message)
        self._dispatcher.on_verify(message, now_ms())
        self._decide_soon()

    async def _receive(self, message: Message) -> None:
        match message:
            case Result():
                self._count_result(message)
                self._dispatcher.on_result(message, now_ms())
                if self._spans and (message.finish is not None or message.status is Status.FAILED):
                    self._spans.forget(message.session)
            case Heartbeat():
                self._dispatcher.on_heartbeat(message, now_ms())
            case CostModel():
                self._dispatcher.on_cost_model(message, now_ms())
            case Cancel():
                self._dispatcher.on_cancel(message.session)
                self._spans.forget(message.session)
        if self._stand_in is not None and isinstance(message, Result | Cancel):
            await self._stand_in.receive(message)
        self._decide_soon()

    def _count_result(self, result: Result) -> None:
        """Count a result of a round that this scheduler has sent."""
        fleet = self._dispatcher.fleet
        if result.status is not Status.COMMITTED or result.run or result.session not in fleet.sessions:
            return
        metrics.ROUNDS.labels(metrics.deadline(self.due_ms(result.session), now_ms())).inc()
        if (state := fleet.verifiers.get(result.verifier)) is None or not result.new_tokens:
            return
        metrics.INTERFERENCE.observe(metrics.interference_ms(result, state.model) / 1000)
        # The results of a batch follow each other.
        if state.timed_batch != result.batch and (error := metrics.prediction_error(result)) is not None:
            state.timed_batch = result.batch
            metrics.PREDICTION_ERROR.observe(error)

    async def _send(self, verifier_id: str, batch: Batch, trace: tracing.Headers | None) -> None:
        try:
            await self._broker.publish(batch, topology.batch(verifier_id), confirmed=True, trace=trace)
        except BrokersError as error:
            self._log.warning("batch not taken, its jobs go to others", verifier=verifier_id, error=str(error))
            self._dispatcher.on_returned(verifier_id, now_ms())
            self._decide_soon()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        sending = asyncio.create_task(work)
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    def _decide_soon(self) -> None:
        """Decide once for all messages that have already arrived, so that a burst of rounds shares a batch."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(0, self._decide)

    def _decide(self) -> None:
        """Send the batches that are due, and set the timer for the next decision."""
        if (paused_ms := now_ms() - self._decided_ms) > PAUSE_MS:
            self._log.warning("this scheduler stood still", ms=round(paused_ms))
            self._dispatcher.on_pause(paused_ms)
            if self._stand_in is not None:
                self._stand_in.on_pause(paused_ms)
        self._decided_ms = now_ms()
        with metrics.DECISION_TIME.time():
            sends, wake_ms = self._dispatcher.dispatch(now_ms())
        wait_s = IDLE_S if wake_ms is None else min(IDLE_S, max(0.0, (wake_ms - now_ms()) / 1000))
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._decide)
        for verifier_id, batch in sends:
            self._log.debug("batch sent", batch=batch.batch, verifier=verifier_id, predicted_ms=batch.predicted_ms)
            # Not awaited: the broker's confirm takes a while, and the next decision does not depend on it.
            trace = self._spans.sent(batch, verifier_id) if self._spans else None
            self._spawn(self._send(verifier_id, batch, trace))
            _count(verifier_id, batch)
        for verifier_id, session_ids in self._dispatcher.releases().items():
            self._spawn(self._broker.publish(Release(sessions=session_ids), topology.batch(verifier_id)))
        for verifier_id, session_ids in self._dispatcher.halts().items():
            self._spawn(self._broker.publish(Halt(sessions=session_ids), topology.batch(verifier_id)))
        metrics.RUNS.set(sum(len(state.runs) for state in self._dispatcher.fleet.verifiers.values()))
        metrics.WAITING.set(self._dispatcher.fleet.pending_count)
        metrics.WITHOUT_ROOM.set(len(self._dispatcher.fleet.waiting))
        metrics.VERIFIERS.set(len(self._dispatcher.fleet.verifiers))

    async def _publish_load(self, every_s: float) -> None:
        """Publish the load regularly. A standby, which gets no rounds, publishes none."""
        while True:
            await asyncio.sleep(every_s)
            if self._dispatcher.active:
                load = self._dispatcher.load(now_ms())
                if self._stand_in is not None:
                    load = load.model_copy(update={"without_drafters": self._stand_in.without_drafters()})
                metrics.PRICE.set(load.price_ms)
                metrics.UTILIZATION.set(load.utilization)
                metrics.DEMAND.set(load.demand)
                metrics.QUEUE_DELAY.set(load.backlog_ms / 1000)
                await self._broker.publish(load, topology.LOAD)


def _count(verifier_id: str, batch: Batch) -> None:
    """Count a batch that is sent."""
    metrics.BATCHES.labels(verifier_id).inc()
    metrics.BATCH_JOBS.observe(len(batch.jobs))
    for job in batch.jobs:
        metrics.QUEUE_TIME.observe(job.queue_ms / 1000)
        if job.slack_ms is not None:
            metrics.SLACK.observe(job.slack_ms / 1000)
        if job.prefill_to is None:
            metrics.TRIMMED.inc(job.drafted - len(job.draft))
        else:
            metrics.CHUNKS.inc()
