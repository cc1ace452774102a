"""The gateway's transport over RabbitMQ and Redis keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from transport_contract import Received, TransportContract

from services.gateway.transport import BrokerTransport
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import DEFAULT_POOL, Topology
from shared.messages import Cancel, Ended, Finish, Generate, Message, Result
from shared.state.commits import Commit
from shared.state.store import Store


@dataclass
class LiveServices:
    """A drafter and a verifier over real brokers, beside two gateways."""

    a: Received
    b: Received
    broker: Broker
    store: Store
    generated: list[tuple[str, Generate]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    _rounds: int = 0

    async def generate(self, message: Message) -> None:
        assert isinstance(message, Generate)
        self.generated.append((DEFAULT_POOL, message))

    async def announcement(self, message: Message) -> None:
        if isinstance(message, Cancel):
            self.cancelled.append(message.session)
        else:
            assert isinstance(message, Ended)
            self.ended.append(message)

    async def commit(self, session_id: str, tokens: Sequence[int], finish: Finish | None = None) -> None:
        progress = await self.store.progress(session_id, 0)
        assert progress is not None
        commit = Commit(session_id, self._rounds, progress.length, len(tokens) - 1, tokens, finish, 0)
        self._rounds += 1
        await self.store.commit("v1", [commit])

    async def publish(self, gateway: str, result: Result) -> None:
        await self.broker.publish(result, topology.result(gateway))


@pytest.fixture
async def services(amqp_url: str, redis_url: str, namespace: str) -> AsyncIterator[LiveServices]:
    names = Topology(namespace)
    store = Store.connect(redis_url, namespace, 60)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)

        async def connect(name: str) -> Broker:
            broker = await Broker.connect(amqp_url, names, name)
            stack.push_async_callback(broker.close)
            return broker

        async def gateway(name: str) -> Received:
            broker = await connect(name)
            queue = names.own_queue("gateway", name, (topology.result(name),))
            received = Received(BrokerTransport(broker, store, name, queue, patience_ms=60_000))
            await broker.consume(queue, received.receive)
            return received

        live = LiveServices(await gateway("a"), await gateway("b"), await connect("services"), store)
        await live.broker.consume(names.generate_queue(), live.generate)
        own = names.own_queue("peer", "peer", (topology.CANCEL, topology.ENDED))
        await live.broker.consume(own, live.announcement)
        yield live


class TestBrokerTransport(TransportContract):
    """The contract's cases, over `services`."""
