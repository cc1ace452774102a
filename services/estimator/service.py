"""The estimator's loop: samples in, cost models out, the last ones kept in Redis."""

from __future__ import annotations

import asyncio

from services.estimator.fit import VerifierFit
from services.estimator.settings import EstimatorSettings
from shared import logging, topology
from shared.broker import Broker
from shared.errors import BrokersError
from shared.messages import CostModel, Message, Sample
from shared.service import running
from shared.store import Store
from shared.topology import Topology


async def serve(settings: EstimatorSettings, instance: str, stop: asyncio.Event) -> None:
    """Run an estimator until `stop` is set."""
    log = logging.get()
    broker = await Broker.connect(settings.amqp_url, Topology(settings.namespace), instance)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s)
    known: dict[str, CostModel] = {}
    try:
        known = {model.verifier: model for model in await store.cost_models()}
    except BrokersError as error:
        log.warning("starting without the stored cost models", error=str(error))
    fits: dict[str, VerifierFit] = {}
    changed: set[str] = set()

    async def receive(message: Message) -> None:
        if isinstance(message, Sample):
            name = message.verifier
            if name not in fits:
                fits[name] = VerifierFit(name, settings.forgetting, known.get(name))
            for batch in message.batches:
                fits[name].add(batch, profile=message.profile)
            changed.add(name)

    async def publish() -> None:
        while True:
            await asyncio.sleep(settings.publish_ms / 1000)
            names = sorted(changed)
            changed.clear()
            for name in names:
                model = fits[name].model()
                await broker.publish(model, topology.costmodel(name))
                try:
                    await store.save_cost_model(model)
                except BrokersError as error:
                    log.warning("cost model not stored", verifier=name, error=str(error))

    try:
        await broker.consume(broker.topology.sample_queue(), receive)
        log.info("ready", known=len(known))
        async with running(stop, publish()):
            pass
    finally:
        await broker.close()
        await store.close()
