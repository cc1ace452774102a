"""The broker in memory, which stands in for RabbitMQ in tests, keeps the contract of the broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
from broker_contract import BrokerContract, Connect
from memory_broker import MemoryBroker, MemoryServer

from shared.broker.client import Broker


@pytest.fixture
def connect() -> Iterator[Connect]:
    server = MemoryServer()

    async def make(_name: str) -> Broker:
        return cast("Broker", MemoryBroker(server))

    yield make
    server.close()


class TestMemoryBroker(BrokerContract):
    """The contract's cases, over `connect`."""
