"""More sessions at once than the verifiers' caches hold: some wait before they begin, and each gets its text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import httpx
import pytest
from patience import HANG_S
from prometheus_client.parser import text_string_to_metric_families

from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos.client import ChaosClient
from services.tools.chaos.core.requests import ChaosRequest, Manner, load
from services.tools.chaos.core.verdicts import RequestVerdict
from services.tools.chaos.reference import References
from services.tools.local.brokers import Brokers
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.stack import Stack

TOKENS = 32
REQUESTS = 24
CACHE_TOKENS = 1024
"""The smallest cache: it holds one to eight of these sessions."""


@dataclass
class SmallSuite:
    """A stack with small caches, a client, its requests, and the address of the scheduler's metrics."""

    stack: Stack
    client: ChaosClient
    requests: list[ChaosRequest]
    metrics: str

    async def without_room(self) -> float:
        """Sessions that wait for room now."""
        async with httpx.AsyncClient() as http:
            text = (await http.get(self.metrics)).text
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        return next(one.value for one in samples if one.name == "wisp_scheduler_sessions_without_room")


@pytest.fixture(scope="module")
async def suite(brokers: Brokers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SmallSuite]:
    folder = tiny_model(tmp_path_factory.mktemp("memory") / "tiny")
    asked = load(11, questions=REQUESTS, longest=TOKENS)
    references = References(folder, asked.questions, TOKENS)
    plain = asked.request(0, 0)
    requests = [
        replace(plain, question=question, manner=Manner.STREAM, max_tokens=TOKENS, draft="auto")
        for question in asked.questions
    ]
    (port,) = free_ports(1)
    async with Stack(
        "memory",
        brokers=brokers,
        target=folder,
        verifiers=2,
        env={"WISP_THREADS": "1", "WISP_ADMISSION": "false"},
        env_of={
            "scheduler": {"WISP_METRICS_PORT": str(port)},
            "verifier": {
                "WISP_CACHE_TOKENS": str(CACHE_TOKENS),
                "WISP_PROFILE": "false",
                "WISP_EMULATED_COST": json.dumps([20, 0, 0, 0, 0, 0, 0]),
            },
        },
    ) as stack:
        client = ChaosClient(folder.name, lambda: stack.urls, references)
        yield SmallSuite(stack, client, requests, f"http://{LOOPBACK}:{port}/metrics")


async def test_sessions_that_wait_for_room_get_their_texts(suite: SmallSuite) -> None:
    asking = asyncio.gather(*(suite.client.ask(request) for request in suite.requests))
    waited = 0.0
    while not asking.done():
        waited = max(waited, await suite.without_room())
        await asyncio.sleep(0.02)
    assert {outcome.verdict for outcome in await asking} == {RequestVerdict.RIGHT}
    assert waited > 0
    assert await suite.without_room() == 0


async def test_clients_that_leave_while_they_wait_keep_no_room(suite: SmallSuite) -> None:
    leaving = [asyncio.create_task(suite.client.ask(request)) for request in suite.requests]
    while not await suite.without_room():
        assert not all(task.done() for task in leaving)
        await asyncio.sleep(0.01)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    asked = await asyncio.gather(*(suite.client.ask(request) for request in suite.requests[:4]))
    assert {outcome.verdict for outcome in asked} == {RequestVerdict.RIGHT}
    async with asyncio.timeout(HANG_S):
        waiting = 1.0
        while waiting:
            waiting = await suite.without_room()
            await asyncio.sleep(0.02)
