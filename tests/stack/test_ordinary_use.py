"""Clients that ask for no promise, on a slow verifier and on a machine that stands still: nothing is lost."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import psutil
import pytest
from patience import HANG_S

from services.tools.bench.support.tiny import tiny_model
from services.tools.local.stack import Stack

BATCH_MS, JOB_MS, TOKEN_MS = 150.0, 10.0, 5.0
STALL_S = 5
PAUSE_S = 6.0
"""Longer than leases, heartbeats and the signs of life of gateways last, and than Redis may take to answer."""
PARALLEL = 50


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A suite with default limits, with brokers of its own, and with a verifier as slow as an old machine's."""
    target = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    cost = [BATCH_MS, JOB_MS, TOKEN_MS, 0, 0, 0, TOKEN_MS]
    async with Stack(
        "ordinary",
        target=target,
        env={"WISP_THREADS": "1"},
        env_of={
            "gateway": {"WISP_STALL_TIMEOUT_S": str(STALL_S)},
            "verifier": {"WISP_EMULATED_COST": json.dumps(cost)},
            "drafter": {"WISP_DRAFT_SOURCE": "none"},
        },
    ) as running:
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.url, timeout=HANG_S, limits=limits) as http:
        yield http


async def chat(client: httpx.AsyncClient, stack: Stack, text: str, tokens: int, *, stream: bool = False) -> str:
    """Return what became of a chat: its finish reason, or its error."""
    body = {
        "model": stack.target.name,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    response = await client.post("/chat/completions", json=body)
    if response.status_code != 200:
        return response.text
    if not stream:
        return str(response.json()["choices"][0]["finish_reason"])
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    return str(events[-1]["error"] if "error" in events[-1] else events[-1]["choices"][0]["finish_reason"])


async def test_many_parallel_default_chats_all_succeed_on_a_slow_machine(
    stack: Stack, client: httpx.AsyncClient
) -> None:
    started = asyncio.get_running_loop().time()
    asking = [chat(client, stack, f"number {n}", 5, stream=bool(n % 2)) for n in range(PARALLEL)]
    assert await asyncio.gather(*asking) == ["length"] * PARALLEL
    assert asyncio.get_running_loop().time() - started > 2 * STALL_S, "the verifier is too fast for a queue"


async def test_bursts_behind_one_another_lose_nothing(stack: Stack, client: httpx.AsyncClient) -> None:
    async def rounds(number: int) -> list[str]:
        return [await chat(client, stack, f"{number} of burst {burst}", 2) for burst in range(3)]

    ends = await asyncio.gather(*(rounds(number) for number in range(16)))
    assert {end for of_one in ends for end in of_one} == {"length"}


async def test_requests_wait_out_a_pause_of_the_whole_machine(stack: Stack, client: httpx.AsyncClient) -> None:
    running = [asyncio.create_task(chat(client, stack, f"runs {n}", 30, stream=bool(n % 2))) for n in range(6)]
    await asyncio.sleep(2)
    started = [process.pid for process in stack.processes()]
    started += [process.pid for server in stack.brokers.servers for process in server.processes]
    everything = [psutil.Process(pid) for pid in started]
    everything += [child for parent in everything for child in parent.children(recursive=True)]

    def send(number: signal.Signals) -> None:
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    for _ in range(2):
        send(signal.SIGSTOP)
        try:
            # These arrive while nothing runs, and are read as soon as the gateway does again.
            new = [asyncio.create_task(chat(client, stack, f"arrives {n}", 4)) for n in range(6)]
            await asyncio.sleep(PAUSE_S)
        finally:
            send(signal.SIGCONT)
        assert await asyncio.gather(*new) == ["length"] * 6
    assert await asyncio.gather(*running) == ["length"] * 6
