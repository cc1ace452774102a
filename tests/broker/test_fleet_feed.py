"""The feed of the fleet view over a real broker: a queue while somebody looks, and none otherwise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import aio_pika
import builders
import httpx
from aiormq.exceptions import ChannelLockedResource, ChannelNotFoundEntity
from gateway_suite import Start, Suite
from patience import HANG_S

from shared.broker import topology

SESSION = "chatcmpl-0123456789abcdef01234567"


async def queue_exists(amqp_url: str, name: str) -> bool:
    """Report whether a queue exists that another connection owns."""
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        try:
            await channel.declare_queue(name, passive=True)
        except ChannelNotFoundEntity:
            return False
        except ChannelLockedResource:
            return True
    raise AssertionError(f"{name} is not exclusive")


async def events(response: httpx.Response) -> AsyncIterator[dict[str, object]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


async def speak(suite: Suite) -> None:
    """Publish what a verifier, a drafter and a scheduler say, again and again."""
    number = 0
    while True:
        number += 1
        one = builders.result(SESSION, number, 3, [7, 8], accepted=1, trimmed_to=1, batch=f"b{number}", verify_ms=2.0)
        await suite.peer.broker.publish(one, topology.RESULT_SCHEDULER)
        await suite.peer.broker.publish(builders.heartbeat("v1"), topology.heartbeat("v1"))
        await suite.peer.broker.publish(builders.drafter_heartbeat("d1"), topology.drafter("d1"))
        await suite.peer.broker.publish(builders.load(policy="edf"), topology.LOAD)
        await asyncio.sleep(0.05)


async def until(
    feed: AsyncIterator[dict[str, object]], wanted: Callable[[dict[str, object]], object]
) -> dict[str, object]:
    async with asyncio.timeout(HANG_S):
        async for event in feed:
            if wanted(event):
                return event
    raise AssertionError("the feed ended")


def whole(event: dict[str, object]) -> bool:
    state = event.get("state")
    return isinstance(state, dict) and bool(state["verifiers"] and state["drafters"] and state["scheduler"])


async def test_the_feed_shows_the_suite_while_somebody_looks(start: Start, amqp_url: str, namespace: str) -> None:
    queue = f"{namespace}.gateway.gateway-test.fleet"
    async with start() as suite:
        speaking = asyncio.create_task(speak(suite))
        assert not await queue_exists(amqp_url, queue)
        async with suite.http.stream("GET", "/fleet/events") as response:
            feed = events(response)
            event = await until(feed, lambda event: event.get("news"))
            assert isinstance(event["news"], list)
            (job,) = event["news"][0]["jobs"]
            assert (job["session"], job["accepted"]) == ("234567", 1)
            await until(feed, whole)
            assert await queue_exists(amqp_url, queue)
        async with asyncio.timeout(HANG_S):
            while await queue_exists(amqp_url, queue):  # noqa: ASYNC110 only the broker knows
                await asyncio.sleep(0.05)
        speaking.cancel()
        with suppress(asyncio.CancelledError):
            await speaking


async def test_a_stopping_gateway_ends_the_feed_and_closes_its_queue(
    start: Start, amqp_url: str, namespace: str
) -> None:
    async with start() as suite, suite.http.stream("GET", "/fleet/events") as response:
        assert response.status_code == 200
        suite.stop.set()
        async with asyncio.timeout(HANG_S):
            assert [event async for event in events(response)]
            await suite.serving
        assert not await queue_exists(amqp_url, f"{namespace}.gateway.gateway-test.fleet")
