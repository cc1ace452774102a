"""The estimator as a service, on real brokers."""

from __future__ import annotations

import asyncio

import pytest
from patience import HANG_S

from services.estimator import service
from services.estimator.service import serve
from services.estimator.settings import EstimatorSettings
from shared import cost
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import Unroutable
from shared.messages import CostModel, Measurement, Message, Sample
from shared.state.registry import Registry
from shared.state.store import Store


def samples(speed: float) -> list[Measurement]:
    """Return measured batches of a verifier that takes 50 ms, and 2 ms per new token, times `speed`."""
    shapes = [cost.shape_of([(new, 100 + new, 1)] * jobs) for jobs in (1, 2, 4) for new in (1, 5, 32)]
    return [Measurement(shape=s, measured_ms=speed * (50.0 + 2.0 * s.new_tokens)) for s in shapes]


async def test_models_are_published_stored_and_continued_after_a_restart(
    amqp_url: str, redis_url: str, namespace: str
) -> None:
    settings = EstimatorSettings(amqp_url=amqp_url, redis_url=redis_url, namespace=namespace, publish_ms=50)
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    store = Store.connect(redis_url, namespace, 60)
    models: asyncio.Queue[Message] = asyncio.Queue()
    await broker.consume(broker.topology.own_queue("test", "peer", (topology.costmodel("*"),)), models.put)
    shape = cost.shape_of([(8, 108, 1)] * 2)

    async def learn(batches: list[Measurement], *, profile: bool) -> CostModel:
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(settings, "estimator", stop))
        async with asyncio.timeout(HANG_S):
            while True:
                try:
                    sample = Sample(verifier="v1", batches=batches, profile=profile)
                    await broker.publish(sample, topology.SAMPLE, confirmed=True)
                    break
                except Unroutable:  # its queue does not exist yet
                    await asyncio.sleep(0.02)
        model = await asyncio.wait_for(models.get(), HANG_S)
        async with asyncio.timeout(HANG_S):
            while model not in await store.registry.cost_models():  # noqa: ASYNC110 - Redis has no event for it
                await asyncio.sleep(0.02)
        stop.set()
        await asyncio.wait_for(serving, HANG_S)
        assert isinstance(model, CostModel)
        return model

    first = await learn(samples(1.0), profile=True)
    assert cost.predict_ms(first, shape) == pytest.approx(82.0, rel=0.05)
    assert await store.registry.cost_models() == [first]

    # A restarted estimator continues from the stored model, although it receives a single batch.
    second = await learn(samples(1.0)[:1], profile=False)
    assert (second.version, second.samples) == (first.version + 1, first.samples + 1)
    assert cost.predict_ms(second, shape) == pytest.approx(82.0, rel=0.05)

    # The profile of a restarted verifier replaces the model of its predecessor with the same name.
    third = await learn(samples(3.0), profile=True)
    assert cost.predict_ms(third, shape) == pytest.approx(3 * 82.0, rel=0.05)
    assert third.samples == len(samples(3.0))
    await broker.close()
    await store.close()


async def test_a_verifier_that_was_forgotten_continues_from_its_stored_model(
    amqp_url: str, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "REMEMBERED", 2)
    settings = EstimatorSettings(amqp_url=amqp_url, redis_url=redis_url, namespace=namespace, publish_ms=50)
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    registry = Registry.connect(redis_url, namespace)
    estimator = service.Estimator(settings, broker, registry)
    publishing = asyncio.create_task(estimator.publish())

    async def learned(verifier_id: str, version: int, *, profile: bool) -> CostModel:
        sample = Sample(verifier=verifier_id, batches=samples(1.0)[: None if profile else 1], profile=profile)
        await estimator.receive(sample)
        async with asyncio.timeout(HANG_S):
            while True:
                for model in await registry.cost_models():
                    if (model.verifier, model.version) == (verifier_id, version):
                        return model
                await asyncio.sleep(0.02)

    first = await learned("v0", 1, profile=True)
    for number in range(1, 4):
        await learned(f"v{number}", 1, profile=True)
    async with asyncio.timeout(HANG_S):
        while estimator.remembered > 2:  # noqa: ASYNC110 - it forgets after it has published
            await asyncio.sleep(0.02)
    again = await learned("v0", 2, profile=False)
    assert again.samples == first.samples + 1
    publishing.cancel()
    await broker.close()
    await registry.close()
