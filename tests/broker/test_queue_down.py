"""A shared queue with one copy, on a node of a RabbitMQ cluster that does not run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from patience import HANG_S
from rabbitmq_cluster import rabbitmq_cluster
from rabbitmqctl import rabbitmqctl

from services.tools.local.servers import BrokerServer
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import BrokersError, QueueDown, WispError
from shared.messages import Message
from shared.runtime.health import Health
from shared.state.store import Store

pytestmark = pytest.mark.slow

NAMES = Topology("queue-down")
QUEUE = NAMES.verify_queue()
OWN = NAMES.own_queue("scheduler", "running", ())


async def ignore(message: Message) -> None:
    """A consumer."""


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[list[BrokerServer]]:
    """A cluster whose last node holds the queue."""
    async with rabbitmq_cluster(tmp_path) as running:
        first = await Broker.connect(running[-1].url, NAMES, "first")
        await first.consume(QUEUE, ignore)
        await first.close()
        yield running


FAILURE_THRESHOLD = 3
"""Failures in a row after which the manifests' liveness probes restart a process."""
PERIOD_S = 10.0
"""Time between the manifests' liveness probes."""


async def until(holds: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(HANG_S):
        while not await holds():  # noqa: ASYNC110 conditions ask the broker
            await asyncio.sleep(0.2)


async def test_it_is_reported_and_waited_for(nodes: list[BrokerServer], redis_url: str, namespace: str) -> None:
    async with AsyncExitStack() as stack:
        broker = await Broker.connect(nodes[0].url, NAMES, "running")
        stack.push_async_callback(broker.close)
        store = Store.connect(redis_url, namespace, 60)
        stack.push_async_callback(store.close)
        await broker.consume(QUEUE, ignore)
        await broker.consume(OWN, ignore)
        health = Health()
        health.watch(broker, store)

        async def works() -> bool:
            return await health.ready() == {}

        async def is_down() -> bool:
            try:
                await broker.liveness.check_queue(QUEUE)
            except QueueDown as error:
                return "on a node that does not run" in str(error)
            except WispError:
                pass
            return False

        await until(works)
        await nodes[-1].kill()
        await until(is_down)
        assert "on a node that does not run" in (await health.ready())["rabbitmq"]
        assert await health.live() == {}, "no restart of this process starts the node"

        failing_since: float | None = None

        async def is_restored() -> bool:
            nonlocal failing_since
            # An answer may take longer than a second on a busy machine. Kubernetes restarts after several failures.
            failing_since = (failing_since or monotonic()) if await health.live() else None
            assert failing_since is None or monotonic() - failing_since < (FAILURE_THRESHOLD - 1) * PERIOD_S
            try:
                await broker.liveness.prove(OWN)
            except BrokersError:
                return False
            return True

        await rabbitmqctl(nodes[0], "close_all_connections", "test")
        await until(is_restored)
        assert "on a node that does not run" in (await health.ready())["rabbitmq"]
        starting = await Broker.connect(nodes[1].url, NAMES, "starting")
        stack.push_async_callback(starting.close)

        attempts = 0

        async def start() -> None:
            """Consume. An attempt may end before a busy machine has started the node; Kubernetes makes another."""
            nonlocal attempts
            while True:
                attempts += 1
                with suppress(BrokersError):
                    return await starting.consume(QUEUE, ignore)

        consuming = asyncio.create_task(start())
        await asyncio.sleep(2)
        assert (consuming.done(), attempts) == (False, 1), "it waits for the node"
        await nodes[-1].restart()
        await asyncio.wait_for(consuming, HANG_S)
        await until(works)
