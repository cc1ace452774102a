"""The store in memory, which stands in for Redis in tests, keeps the contract of the store."""

from __future__ import annotations

from typing import cast

import pytest
from memory_store import MemoryStore
from store_contract import StoreContract

from shared.state.store import Store


@pytest.fixture
def store() -> Store:
    return cast("Store", MemoryStore())


class TestMemoryStore(StoreContract):
    """The contract's cases, over `store`."""
