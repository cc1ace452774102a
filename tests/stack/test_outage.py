"""The whole suite while its link to RabbitMQ or Redis is cut and restored: the tokens are late but the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asking import Case, Client, progressed, watching
from link import Link, link_to
from patience import HANG_S

from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack

CUT_S = 3.0


@pytest.fixture(scope="module")
async def links(brokers: Brokers) -> AsyncIterator[dict[str, Link]]:
    async with link_to(brokers.amqp_url) as rabbitmq, link_to(brokers.redis_url) as redis:
        yield {"rabbitmq": rabbitmq, "redis": redis}


@pytest.fixture(scope="module")
async def linked(brokers: Brokers, links: dict[str, Link], target_folder: Path) -> AsyncIterator[Stack]:
    """A suite whose services reach the brokers over interruptible links only."""
    env = {
        "WISP_AMQP_URL": links["rabbitmq"].url,
        "WISP_REDIS_URL": links["redis"].url,
        "WISP_CACHE_TOKENS": "4096",
        "WISP_ADMISSION": "false",
    }
    async with Stack("test-outage", brokers=brokers, target=target_folder, env=env) as running:
        yield running


@pytest.mark.parametrize("server", ["rabbitmq", "redis"])
async def test_streams_outlive_an_outage(linked: Stack, links: dict[str, Link], cases: list[Case], server: str) -> None:
    async with httpx.AsyncClient(timeout=HANG_S) as http, watching(linked) as seen:
        client = Client(http, linked)
        streams = asyncio.create_task(client.ask_all(cases[:8], "lookup"))
        await progressed(seen, 12)
        assert not streams.done(), "the outage must fall into the streams"
        await links[server].cut()
        try:
            # Without RabbitMQ, a run goes on and is read from Redis, so streams may end meanwhile.
            await asyncio.sleep(CUT_S)
        finally:
            await links[server].mend()
        assert await streams == [case.tokens for case in cases[:8]]
        assert await client.ask_all(cases[8:12], "none") == [case.tokens for case in cases[8:12]]
