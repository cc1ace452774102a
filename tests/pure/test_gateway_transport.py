"""The transport in memory, which stands in for RabbitMQ and Redis in the gateway's tests, keeps the contract."""

from __future__ import annotations

import pytest
from gateway_memory import MemoryServices, MemoryTransport
from transport_contract import Received, TransportContract


class InMemory(MemoryServices):
    """The services, with two gateways."""

    def __init__(self) -> None:
        super().__init__()
        transports = MemoryTransport(self, "a"), MemoryTransport(self, "b")
        self.a, self.b = map(Received, transports)
        for transport, gateway in zip(transports, (self.a, self.b), strict=True):
            transport.deliver_to(gateway.receive)


@pytest.fixture
def services() -> InMemory:
    return InMemory()


class TestMemoryTransport(TransportContract):
    """The contract's cases, over `services`."""
