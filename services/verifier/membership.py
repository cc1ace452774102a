"""Membership of a verifier in the fleet: its lease, its heartbeats, its measurements and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from services.verifier import metrics
from services.verifier.core.tasks import FEATURES
from services.verifier.heartbeat_thread import HeartbeatThread
from services.verifier.sessions import SessionTable
from shared.broker import topology
from shared.broker.client import Broker
from shared.errors import BrokersError
from shared.messages import CostModel, Heartbeat, Measurement, Residency, Sample
from shared.runtime import logging
from shared.state.store import Store

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine

HANGING_S = 20.0
"""The heartbeats of a verifier whose event loop has not run for this long end: it replies to no batch either."""


class Membership:
    """Announces one verifier to schedulers, gateways and estimators.

    Heartbeats are sent, and the lease is renewed, in a thread of their own; everything else happens in the main thread.
    """

    def __init__(
        self,
        verifier_id: str,
        fingerprint: str,
        engine: TargetEngine,
        sessions: SessionTable,
        broker: Broker,
        store: Store,
        thread: HeartbeatThread,
    ) -> None:
        self.verifier_id = verifier_id
        self.fingerprint = fingerprint
        self.arithmetic = engine.arithmetic
        self.features = FEATURES if engine.has_logits else []
        """Features of sessions that this verifier serves."""
        self._engine = engine
        self._sessions = sessions
        self._broker = broker
        self._store = store
        self._thread = thread
        self._ran_s = monotonic()
        """When the main thread's event loop last ran."""
        self._lease = 0
        self._draining = False
        self._measured: list[Measurement] = []
        self._log = logging.get()

    async def join(self) -> None:
        """Take a first lease. If Redis is unreachable, the heartbeats ask again."""
        with suppress(BrokersError):
            self._lease = await self._store.registry.renew(self.verifier_id, 0)

    @property
    def lease(self) -> int:
        """The present lease; 0 before the first one."""
        return self._lease

    def is_fenced(self, lease: int) -> bool:
        """Return whether a batch's lease has ended: its scheduler has given this verifier up since."""
        return lease not in (0, self._lease)

    async def announce_cost(self, model: CostModel, measured: Sequence[Measurement]) -> None:
        """Publish the cost model from the start-up profile, and the profile itself for the estimator."""
        await self._broker.publish(model, topology.costmodel(self.verifier_id))
        try:
            await self._store.registry.save_cost_model(model)
        except BrokersError as error:
            self._log.warning("cost model not stored", error=str(error))
        profiled = Sample(verifier=self.verifier_id, batches=list(measured), profile=True)
        await self._broker.publish(profiled, topology.SAMPLE)

    def record(self, measurement: Measurement) -> None:
        """Queue a batch's measurement for the next sample."""
        self._measured.append(measurement)

    async def beat(self, every_s: float) -> None:
        """Let the thread send heartbeats, and publish the measurements since the last sample, for ever."""
        self._ran_s = monotonic()
        beating = asyncio.ensure_future(self._thread.run(self._beat(every_s)))
        try:
            while True:
                self._ran_s = monotonic()
                if self._measured:
                    batches, self._measured = self._measured, []
                    await self._broker.publish(Sample(verifier=self.verifier_id, batches=batches), topology.SAMPLE)
                await asyncio.wait([beating], timeout=every_s)
                if beating.done():
                    beating.result()  # raises its error
        finally:
            beating.cancel()

    async def _beat(self, every_s: float) -> None:
        """Publish heartbeats for ever. Runs in the thread."""
        while True:
            if monotonic() - self._ran_s < HANGING_S:
                await self._publish_heartbeat()
            await asyncio.sleep(every_s)

    async def _publish_heartbeat(self) -> None:
        """Publish a heartbeat and renew the lease. A new lease is announced by another heartbeat at once.

        Runs in the thread.
        """
        heartbeat = Heartbeat(
            verifier=self.verifier_id,
            fingerprint=self.fingerprint,
            max_len=min(self._engine.max_len, self._engine.budget_tokens),
            free_tokens=self._engine.free_tokens,
            total_tokens=self._engine.budget_tokens,
            lease=self._lease,
            draining=self._draining,
            arithmetic=self.arithmetic,
            features=self.features,
            residency=[Residency(session=s, cached=cached) for s, cached in self._sessions.cached.items()],
        )
        metrics.CACHE_USAGE.set(1 - heartbeat.free_tokens / heartbeat.total_tokens)
        await self._thread.broker.publish(heartbeat, topology.heartbeat(self.verifier_id))
        try:
            lease = await self._thread.registry.renew(self.verifier_id, self._lease)
            await self._thread.registry.beat(heartbeat.model_copy(update={"lease": lease}))
        except BrokersError as error:
            self._log.warning("heartbeat not stored", error=str(error))
            return
        if lease != self._lease:
            if self._lease:
                self._log.warning("lease has ended, batches sent under it are dropped", lease=lease)
            self._lease = lease
            await self._publish_heartbeat()

    async def start_draining(self) -> None:
        """Announce that this verifier takes no new batches."""
        self._draining = True
        await self._thread.run(self._publish_heartbeat())

    async def leave(self) -> None:
        """Remove this verifier's heartbeat and lease from the store."""
        with suppress(BrokersError):
            await self._store.registry.remove(self.verifier_id)
