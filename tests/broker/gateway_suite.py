"""A gateway in this process, its peer, and clients."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from gateway_peer import Peer, settings
from patience import HANG_S
from prometheus_client import generate_latest

from services.gateway.service import serve
from services.tools.local.ports import free_ports
from shared.models.folder import ModelFolder

MODEL = "tiny"
HEADERS = "host: localhost\r\ncontent-type: application/json\r\n"
"""Headers of raw requests."""


@dataclass
class Suite:
    """A running gateway, its peer, and clients."""

    url: str
    peer: Peer
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient
    stop: asyncio.Event
    serving: asyncio.Task[None]
    metrics_before: str
    """The metrics at the start. All gateways of this process share them."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def chat(self, text: str = "Hi", **options: Any) -> Any:
        """Send a chat request with one message."""
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=MODEL, messages=messages, **options)  # type: ignore[call-overload]

    async def metric(self, name: str) -> float:
        """Return the growth of a metric since the start of the suite, summed over its labels."""
        return _value((await self.http.get("/metrics")).text, name) - _value(self.metrics_before, name)

    async def until_idle(self) -> None:
        """Wait until no request runs: the last answer may have been read before its end was counted."""
        async with asyncio.timeout(HANG_S):
            while await self.metric("wisp_num_requests_running") != 0:  # noqa: ASYNC110 - the gateway gives no signal
                await asyncio.sleep(0.02)


def _value(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name + "{"))


Start = Callable[..., AbstractAsyncContextManager[Suite]]
"""Runs a gateway with these settings."""


@asynccontextmanager
async def started(
    amqp_url: str,
    redis_url: str,
    namespace: str,
    target: ModelFolder,
    *,
    peer_amqp_url: str = "",
    peer_redis_url: str = "",
    peer: Peer | None = None,
    **fields: Any,
) -> AsyncIterator[Suite]:
    """Run a gateway with these settings during the context, beside the given `peer` or one of its own."""
    port = free_port()
    given = settings(target.path, namespace=namespace, amqp_url=amqp_url, redis_url=redis_url, port=port, **fields)
    url = f"http://127.0.0.1:{port}"
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        if peer is None:
            peer = await stack.enter_async_context(
                Peer.run(peer_amqp_url or amqp_url, peer_redis_url or redis_url, namespace, target)
            )
        metrics_before = generate_latest().decode()
        serving = asyncio.create_task(serve(given, given.instance, stop))
        client = await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANG_S)
        )
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, headers={"content-type": "application/json"}, timeout=HANG_S)
        )
        await answers(http)
        try:
            yield Suite(url, peer, client, http, stop, serving, metrics_before)
        finally:
            stop.set()
            await asyncio.wait_for(serving, HANG_S)


def free_port() -> int:
    """Return a free port."""
    (port,) = free_ports(1)
    return port


async def answers(http: httpx.AsyncClient, path: str = "/health", within_s: float = HANG_S) -> None:
    """Wait until this path answers with a 200."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                if (await http.get(path)).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            await asyncio.sleep(0.05)


async def chunks_of(stream: Any) -> list[Any]:
    """Return all chunks of a stream."""
    return [chunk async for chunk in stream]


def text_of(chunks: list[Any], index: int = 0) -> str:
    """Return the text of one choice of a chat's chunks."""
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == index)


async def events_of(http: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    """Return the fields of a stream's events, checked for their form on the wire."""
    async with http.stream("POST", path, json={"model": MODEL, "stream": True} | body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = await response.aread()
    events = raw.decode().split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    found = [re.fullmatch(r"(id: \S+\n)?data: (.+)", event) for event in events]
    fields = [(event[1], json.loads(event[2])) for event in found if event]
    assert len(fields) == len(events)
    assert all(("error" in one) is (cursor is None) for cursor, one in fields), (
        "every event except an error has a stream cursor as its id"
    )
    return [one for _, one in fields]
