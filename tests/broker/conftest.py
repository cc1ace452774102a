"""A gateway over a tiny model, for all modules that test one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from secrets import token_hex
from typing import Any

import pytest
from gateway_peer import tiny_target
from gateway_suite import MODEL, Start, Suite, started

from shared.models.folder import ModelFolder


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return tiny_target(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
def start(amqp_url: str, redis_url: str, namespace: str, target: ModelFolder) -> Start:
    def starting(**fields: Any) -> AbstractAsyncContextManager[Suite]:
        return started(amqp_url, redis_url, namespace, target, **fields)

    return starting


@pytest.fixture(scope="module")
async def shared(amqp_url: str, redis_url: str, target: ModelFolder) -> AsyncIterator[Suite]:
    async with started(amqp_url, redis_url, f"test-{token_hex(4)}", target) as running:
        yield running
