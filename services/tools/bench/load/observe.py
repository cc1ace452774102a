"""Listens to what verifiers and estimator say about batches and their costs, while a point is measured.

Only samples and cost models, which come a few times a second: to listen to every result would take the cores from the
services. What one round cost is in the request's own trace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import token_hex

from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.messages import CostModel, Measurement, Message, Sample
from shared.runtime.tls import Tls


class BatchObserver:
    """The last cost model of each verifier, and the batches measured since they were last taken."""

    def __init__(self) -> None:
        self._costs: dict[str, CostModel] = {}
        self._batches: list[Measurement] = []

    async def see(self, message: Message) -> None:
        """Take in a message."""
        if isinstance(message, CostModel):
            self._costs[message.verifier] = message
        elif isinstance(message, Sample) and not message.profile:
            self._batches += message.batches

    @property
    def costs(self) -> list[CostModel]:
        """The verifiers' cost models, as far as one was published."""
        return list(self._costs.values())

    def take(self) -> list[Measurement]:
        """The batches since the last call."""
        batches, self._batches = self._batches, []
        return batches


@asynccontextmanager
async def observing(amqp_url: str, namespace: str, tls: Tls | None = None) -> AsyncIterator[BatchObserver]:
    """An observer of the suite in a namespace. Raises BrokersError."""
    name = f"bench-{token_hex(3)}"
    broker = await Broker.connect(amqp_url, Topology(namespace), name, tls=tls)
    observer = BatchObserver()
    try:
        queue = broker.topology.own_queue("observer", name, (topology.SAMPLE, topology.costmodel("*")))
        await broker.consume(queue, observer.see)
        yield observer
    finally:
        await broker.close()
