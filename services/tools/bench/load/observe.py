"""An observer of the verifiers' batches and cost models while a point is measured.

It consumes only samples and cost models, which are published a few times a second. Consuming every result would take
cores from the services; the cost of a single round is in the trace of its request.
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
    """The latest cost model of each verifier, and the batches measured since the last `take`."""

    def __init__(self) -> None:
        self._costs: dict[str, CostModel] = {}
        self._batches: list[Measurement] = []

    async def see(self, message: Message) -> None:
        """Consume a message."""
        if isinstance(message, CostModel):
            self._costs[message.verifier] = message
        elif isinstance(message, Sample) and not message.profile:
            self._batches += message.batches

    @property
    def costs(self) -> list[CostModel]:
        """The published cost models."""
        return list(self._costs.values())

    def take(self) -> list[Measurement]:
        """Return the batches since the last call."""
        batches, self._batches = self._batches, []
        return batches


@asynccontextmanager
async def observing(amqp_url: str, namespace: str, tls: Tls | None = None) -> AsyncIterator[BatchObserver]:
    """Yield an observer of the suite in a namespace. Raises BrokersError."""
    name = f"bench-{token_hex(3)}"
    broker = await Broker.connect(amqp_url, Topology(namespace), name, tls=tls)
    observer = BatchObserver()
    try:
        queue = broker.topology.own_queue("observer", name, (topology.SAMPLE, topology.costmodel("*")))
        await broker.consume(queue, observer.see)
        yield observer
    finally:
        await broker.close()
