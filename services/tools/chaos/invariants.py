"""What has to hold when everything has healed: nothing left behind, and Redis holds what the model would say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence

import aio_pika
import httpx
import msgpack
from redis.asyncio import Redis

from services.tools.chaos.message_faults import MARK
from services.tools.chaos.reference import Reference
from services.tools.chaos.site import Site
from services.tools.replayer.stream import read
from shared.messages import Result, Status
from shared.state.store import Store, unpack

GAUGES = {
    "drafter": ("wisp_drafter_sessions",),
    "scheduler": ("wisp_num_requests_waiting",),
    "gateway": ("wisp_num_requests_running",),
}
"""What has to be 0 where nothing is under way, by service."""


async def settled(site: Site, within_s: float) -> list[str]:
    """Wait until nothing is under way; returns what still is."""
    deadline = time.monotonic() + within_s
    left = ["nothing was looked at"]
    while left and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        left = await _leftovers(site)
    return left


async def _leftovers(site: Site) -> list[str]:
    left = []
    listed = json.loads(
        await site.control_rabbitmq(
            *("-q", "--formatter", "json", "list_queues", "name", "messages_ready", "messages_unacknowledged")
        )
    )
    namespace = site.stack.namespace
    for queue in listed:
        waiting = queue["messages_ready"] + queue["messages_unacknowledged"]
        if queue["name"] not in (f"{namespace}.dead", f"{namespace}.journal") and waiting:
            left.append(f"{waiting} messages in queue {queue['name']}")
    store = Store.connect(site.brokers.redis_url, namespace, 60)
    try:
        beats = await store.heartbeats()
        running = {process.name for process in site.stack.processes("verifier")}
        if {beat.verifier for beat in beats} != running:
            left.append(f"verifiers {sorted(running)} run, {sorted(beat.verifier for beat in beats)} say so")
        for beat in beats:
            if beat.residency or beat.free_tokens != beat.total_tokens:
                held = [held.session for held in beat.residency]
                left.append(f"{beat.verifier} holds {beat.total_tokens - beat.free_tokens} tokens of {held}")
    finally:
        await store.close()
    async with Redis.from_url(site.brokers.redis_url) as redis:
        if due := await redis.zcard(f"{namespace}:deadlines"):
            left.append(f"{due} deadlines in Redis")
        names = [key async for key in redis.scan_iter(f"{namespace}:session:*")]
        left += [f"{name.decode()} is still active" for name in names if await redis.hget(name, "status") == b"active"]
    async with httpx.AsyncClient(timeout=5) as http:
        for service, gauges in GAUGES.items():
            for process in site.stack.processes(service):
                if service == "gateway":
                    url = site.stack.url_of(process).removesuffix("/v1")
                else:
                    url = f"http://127.0.0.1:{site.metrics[process.pid]}"
                values = _values((await http.get(f"{url}/metrics")).text)
                left += [f"{process.name}: {gauge} is {values[gauge]}" for gauge in gauges if values.get(gauge)]
    return left


def _values(text: str) -> dict[str, float]:
    """Metrics by name, summed over their labels."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


async def wrong_states(site: Site, references: Sequence[Reference]) -> tuple[int, list[str]]:
    """How many sessions Redis holds, and those whose committed tokens are not what the model says."""
    namespace = site.stack.namespace
    wrong = []
    count = 0
    async with Redis.from_url(site.brokers.redis_url) as redis:
        async for key in redis.scan_iter(f"{namespace}:session:*"):
            fields = await redis.hgetall(key)
            name = key.decode().rpartition(":")[2]
            tokens = unpack(await _bytes(redis, f"{namespace}:tokens:{name}"))
            count += 1
            if len(tokens) != int(fields[b"length"]):
                wrong.append(f"{name}: length {int(fields[b'length'])}, but {len(tokens)} tokens")
                continue
            request = msgpack.unpackb(fields[b"request"])
            prompt, made = tokens[: request["prompt_len"]], tokens[request["prompt_len"] :]
            if not any(prompt == one.prompt and made == one.tokens[: len(made)] for one in references):
                wrong.append(f"{name}: {made} is the beginning of no text of its prompt")
    return count, wrong


async def against_journal(site: Site) -> tuple[int, list[str]]:
    """How many recorded results of sessions that Redis holds were compared with it, and those that are not in there."""
    namespace = site.stack.namespace
    recording = await read(site.brokers.amqp_url, namespace)
    results = [entry.message for entry in recording.entries() if isinstance(entry.message, Result)]
    wrong = []
    count = 0
    async with Redis.from_url(site.brokers.redis_url) as redis:
        held = {
            name: unpack(await _bytes(redis, f"{namespace}:tokens:{name}")) for name in {one.session for one in results}
        }
    for one in results:
        if one.status is Status.COMMITTED and (tokens := held[one.session]):
            count += 1
            if tokens[one.base_len : one.base_len + len(one.tokens)] != one.tokens:
                wrong.append(f"{one.session}: a result of round {one.round} has {one.tokens} at {one.base_len}")
    return count, wrong


async def _bytes(redis: Redis, key: str) -> bytes:
    found = await redis.get(key)
    return found if isinstance(found, bytes) else b""


async def dead_letters(site: Site) -> tuple[int, Mapping[str, int]]:
    """Dead letters that were poison, and the reasons of all others with their number."""
    poisoned = 0
    others: dict[str, int] = {}
    async with await aio_pika.connect(site.brokers.amqp_url) as connection:
        channel = await connection.channel()
        dead = await channel.get_queue(f"{site.stack.namespace}.dead")
        while (letter := await dead.get(no_ack=True, fail=False)) is not None:
            if letter.headers.get(MARK) == "poison":
                poisoned += 1
            else:
                reason = str(letter.headers.get("x-wisp-reason") or letter.headers.get("x-death"))[:300]
                others[reason] = others.get(reason, 0) + 1
    return poisoned, others
