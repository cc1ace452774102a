"""A verifier without an estimator publishes a cost model from its start-up profile. On real brokers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis
from patience import HANG_S
from random_draft import random_draft

from services.verifier.service import serve
from services.verifier.settings import VerifierSettings
from shared import cost
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.messages import CostModel, Message
from shared.models.prepare import prepare
from shared.state.store import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = prepare("smollm2-135m-instruct", Path(".wisp/models"))
    return random_draft(tmp_path_factory.mktemp("model"), target)


async def test_the_profile_becomes_the_cost_model_and_replaces_a_stored_one(
    amqp_url: str, redis_url: str, namespace: str, model: Path
) -> None:
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    store = Store.connect(redis_url, namespace, 60)
    models: asyncio.Queue[Message] = asyncio.Queue()
    await broker.consume(broker.topology.own_queue("test", "peer", (topology.costmodel("v1"),)), models.put)
    await store.registry.save_cost_model(
        cost.FALLBACK.model_copy(update={"verifier": "v1", "coefficients": [9e9] * cost.SIZE, "samples": 900})
    )
    settings = VerifierSettings(
        amqp_url=amqp_url, redis_url=redis_url, namespace=namespace, target=model, threads=1, cache_tokens=4096
    )
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, "v1", stop))
    published = await asyncio.wait_for(models.get(), HANG_S)
    assert isinstance(published, CostModel)
    assert 0 < published.samples < 900
    assert 0 < cost.predict_ms(published, cost.shape_of([(5, 105, 5)])) < 9e9
    async with asyncio.timeout(HANG_S):
        while await store.registry.cost_models() != [published]:  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.02)
    stop.set()
    await asyncio.wait_for(serving, HANG_S)
    await broker.close()
    await store.close()


async def test_a_verifier_that_ends_before_it_is_ready_leaves(
    amqp_url: str, redis_url: str, namespace: str, model: Path
) -> None:
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    announced = asyncio.Event()

    async def note(message: Message) -> None:
        announced.set()

    await broker.consume(broker.topology.own_queue("test", "peer", (topology.costmodel("v1"),)), note)
    settings = VerifierSettings(
        amqp_url=amqp_url, redis_url=redis_url, namespace=namespace, target=model, threads=1, cache_tokens=4096
    )
    client = redis.Redis.from_url(redis_url)
    serving = asyncio.create_task(serve(settings, "v1", asyncio.Event()))
    async with asyncio.timeout(HANG_S):
        await announced.wait()  # it has its lease, and its loops do not run yet or have just begun
        assert client.exists(f"{namespace}:lease:v1")
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    assert not client.exists(f"{namespace}:lease:v1", f"{namespace}:verifier:v1")
    client.close()
    await broker.close()
