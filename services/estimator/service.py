"""The estimator's loop: samples in, cost models out, the last ones kept in Redis."""

from __future__ import annotations

import asyncio

from services.estimator import metrics
from services.estimator.settings import EstimatorSettings
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.cost.fit import VerifierFit
from shared.errors import BrokersError
from shared.messages import CostModel, Message, Sample
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.store import Store


async def serve(settings: EstimatorSettings, instance: str, stop: asyncio.Event) -> None:
    """Run an estimator until `stop` is set."""
    log = logging.get()
    broker = await Broker.connect(
        settings.amqp_url, Topology(settings.namespace), instance, settings.journal_limits, settings.tls
    )
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    fits: dict[str, VerifierFit] = {}
    changed: set[str] = set()

    async def receive(message: Message) -> None:
        if not isinstance(message, Sample):
            return
        name = message.verifier
        if name not in fits:
            # Read only now: while this estimator was a stand-by, the active one has stored newer models.
            start = None if message.profile else await _stored(store, name)
            fits.setdefault(name, VerifierFit(name, settings.forgetting, start))
        fit = fits[name]
        metrics.VERIFIERS.set(len(fits))
        metrics.BATCHES.labels("profile" if message.profile else "live").inc(len(message.batches))
        if message.profile:
            fit.start_from(message.batches)
        else:
            for batch in message.batches:
                fit.add(batch)
        changed.add(name)

    async def publish() -> None:
        while True:
            await asyncio.sleep(settings.publish_ms / 1000)
            names = sorted(changed)
            changed.clear()
            for name in names:
                model = fits[name].model()
                await broker.publish(model, topology.costmodel(name))
                metrics.MODELS.inc()
                try:
                    await store.save_cost_model(model)
                except BrokersError as error:
                    log.warning("cost model not stored", verifier=name, error=str(error))

    try:
        await broker.consume(broker.topology.sample_queue(), receive)
        HEALTH.watch(broker, store)
        log.info("ready")
        async with running(stop, publish()):
            pass
    finally:
        await broker.close()
        await store.close()


async def _stored(store: Store, verifier: str) -> CostModel | None:
    try:
        return next((model for model in await store.cost_models() if model.verifier == verifier), None)
    except BrokersError as error:
        logging.get().warning("starting without the stored cost model", verifier=verifier, error=str(error))
        return None
