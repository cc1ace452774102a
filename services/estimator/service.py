"""The estimator: takes samples, publishes cost models, and stores the latest ones in Redis."""

from __future__ import annotations

import asyncio

from services.estimator import metrics
from services.estimator.settings import EstimatorSettings
from shared.broker import topology
from shared.broker.client import Broker
from shared.cost.fit import VerifierFit
from shared.errors import BrokersError
from shared.messages import CostModel, Message, Sample
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.registry import Registry


async def serve(settings: EstimatorSettings, instance: str, stop: asyncio.Event) -> None:
    """Run an estimator until `stop` is set."""
    broker = await Broker.connect(settings.amqp_url, settings.topology, instance, settings.journal_limits, settings.tls)
    registry = Registry.connect(settings.redis_url, settings.namespace, tls=settings.tls)
    estimator = Estimator(settings, broker, registry)
    try:
        await registry.refuse_cluster()
        await broker.consume(broker.topology.sample_queue(), estimator.receive)
        HEALTH.watch(broker, registry)
        logging.get().info("ready")
        async with running(stop, estimator.publish()):
            pass
    finally:
        await broker.close()
        await registry.close()


REMEMBERED = 1000
"""Fits that are remembered. One that was forgotten continues from the stored model (`Estimator.receive`)."""


class Estimator:
    """The fits of the verifiers that were measured last."""

    def __init__(self, settings: EstimatorSettings, broker: Broker, registry: Registry) -> None:
        self._settings = settings
        self._broker = broker
        self._registry = registry
        self._log = logging.get()
        self._fits: dict[str, VerifierFit] = {}
        self._changed: set[str] = set()

    @property
    def remembered(self) -> int:
        """Number of verifiers whose fits are remembered."""
        return len(self._fits)

    async def receive(self, message: Message) -> None:
        """Learn from a verifier's sample; a start-up profile replaces everything learned before."""
        if not isinstance(message, Sample):
            return
        verifier_id = message.verifier
        if verifier_id not in self._fits:
            # Not read at the start: the active estimator stores newer models while this one stands by.
            stored = None if message.profile else await self._stored(verifier_id)
            self._fits.setdefault(verifier_id, VerifierFit(verifier_id, self._settings.forgetting, stored))
        fit = self._fits.pop(verifier_id)
        self._fits[verifier_id] = fit  # the latest measured one is the last
        metrics.VERIFIERS.set(self.remembered)
        metrics.BATCHES.labels("profile" if message.profile else "live").inc(len(message.batches))
        if message.profile:
            fit.start_from(message.batches)
        else:
            for batch in message.batches:
                fit.add(batch)
        self._changed.add(verifier_id)

    async def publish(self) -> None:
        """Publish and store changed models, one after another, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.publish_ms / 1000)
            changed = sorted(self._changed)
            self._changed.clear()
            for verifier_id in changed:
                model = self._fits[verifier_id].model()
                await self._broker.publish(model, topology.costmodel(verifier_id))
                metrics.MODELS.inc()
                try:
                    await self._registry.save_cost_model(model)
                except BrokersError as error:
                    self._log.warning("cost model not stored", verifier=verifier_id, error=str(error))
            self._forget()

    def _forget(self) -> None:
        """Forget the fits beyond `REMEMBERED` that were measured longest ago, unless they are still to be published."""
        for verifier_id in [*self._fits][: max(0, len(self._fits) - REMEMBERED)]:
            if verifier_id not in self._changed:
                del self._fits[verifier_id]
        metrics.VERIFIERS.set(self.remembered)

    async def _stored(self, verifier_id: str) -> CostModel | None:
        """Return the stored model of a verifier; None if there is none or Redis is unavailable."""
        try:
            return next((model for model in await self._registry.cost_models() if model.verifier == verifier_id), None)
        except BrokersError as error:
            self._log.warning("starting without the stored cost model", verifier=verifier_id, error=str(error))
            return None
