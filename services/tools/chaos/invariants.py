"""Invariants of a suite that has recovered: it is idle, and Redis and the journal have the right tokens."""

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
from services.tools.chaos.site import ChaosSite
from services.tools.local.ports import LOOPBACK
from services.tools.replayer.journal import read
from shared.messages import Result, Status
from shared.state.store import Store, unpack

GAUGES = {
    "drafter": ("wisp_drafter_sessions",),
    "scheduler": ("wisp_num_requests_waiting", "wisp_drafter_sessions"),
    "gateway": ("wisp_num_requests_running",),
}
"""Gauges that are 0 in an idle suite, by service."""


async def settled(site: ChaosSite, within_s: float) -> list[str]:
    """Wait until the suite is idle; return the problems that remain after `within_s`."""
    deadline = time.monotonic() + within_s
    left = ["nothing was checked"]
    while left and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        left = await _leftovers(site)
    return left


async def _leftovers(site: ChaosSite) -> list[str]:
    checks = (_messages_left, _tokens_held, _sessions_active, _gauges_not_zero)
    return [left for check in checks for left in await check(site)]


async def _messages_left(site: ChaosSite) -> list[str]:
    columns = ("name", "messages_ready", "messages_unacknowledged")
    queues = json.loads(await site.control_rabbitmq("-q", "--formatter", "json", "list_queues", *columns))
    kept = {f"{site.stack.namespace}.dead", f"{site.stack.namespace}.journal"}
    counts = {queue["name"]: queue["messages_ready"] + queue["messages_unacknowledged"] for queue in queues}
    return [f"{count} messages in queue {name}" for name, count in counts.items() if count and name not in kept]


async def _tokens_held(site: ChaosSite) -> list[str]:
    """Compare the verifiers' heartbeats with the running processes, and report the KV that they hold."""
    store = Store.connect(site.brokers.redis_url, site.stack.namespace, 60)
    try:
        beats = await store.registry.heartbeats()
    finally:
        await store.close()
    running = {process.name for process in site.stack.processes("verifier")}
    left = []
    if (beating := {beat.verifier for beat in beats}) != running:
        left.append(f"verifiers {sorted(running)} run, but heartbeats come from {sorted(beating)}")
    for beat in beats:
        if beat.residency or beat.free_tokens != beat.total_tokens:
            held = [held.session for held in beat.residency]
            left.append(f"{beat.verifier} holds {beat.total_tokens - beat.free_tokens} tokens of {held}")
    return left


async def _sessions_active(site: ChaosSite) -> list[str]:
    left = []
    async with Redis.from_url(site.brokers.redis_url) as redis:
        if due := await redis.zcard(f"{site.stack.namespace}:deadlines"):
            left.append(f"{due} deadlines in Redis")
        keys = [key async for key in redis.scan_iter(f"{site.stack.namespace}:session:*")]
        left += [f"{key.decode()} is still active" for key in keys if await redis.hget(key, "status") == b"active"]
    return left


async def _gauges_not_zero(site: ChaosSite) -> list[str]:
    left = []
    async with httpx.AsyncClient(timeout=5) as http:
        for service, gauges in GAUGES.items():
            for process in site.stack.processes(service):
                if service == "gateway":
                    url = site.stack.url_of(process).removesuffix("/v1")
                else:
                    url = f"http://{LOOPBACK}:{site.metrics[process.pid]}"
                values = _values((await http.get(f"{url}/metrics")).text)
                left += [f"{process.name}: {gauge} is {values[gauge]}" for gauge in gauges if values.get(gauge)]
    return left


def _values(text: str) -> dict[str, float]:
    """Return the value of each metric, summed over its labels."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


async def wrong_states(site: ChaosSite, references: Sequence[Reference]) -> tuple[int, list[str]]:
    """Return the number of sessions in Redis, and those whose committed tokens differ from every reference."""
    namespace = site.stack.namespace
    wrong = []
    count = 0
    async with Redis.from_url(site.brokers.redis_url) as redis:
        async for key in redis.scan_iter(f"{namespace}:session:*"):
            fields = await redis.hgetall(key)
            if b"request" not in fields:
                continue  # the mark of a session that was cancelled before it was created
            name = key.decode().rpartition(":")[2]
            tokens = unpack(await _bytes(redis, f"{namespace}:tokens:{name}"))
            count += 1
            if len(tokens) != int(fields[b"length"]):
                wrong.append(f"{name}: length {int(fields[b'length'])}, but {len(tokens)} tokens")
                continue
            request = msgpack.unpackb(fields[b"request"])
            prompt, made = tokens[: request["prompt_len"]], tokens[request["prompt_len"] :]
            if not any(prompt == one.prompt and made == one.tokens[: len(made)] for one in references):
                wrong.append(f"{name}: {made} is not the beginning of any reference of its prompt")
    return count, wrong


async def against_journal(site: ChaosSite) -> tuple[int, int, list[str]]:
    """Compare the committed results in the journal with Redis.

    Returns the number of results, how many of them report tokens of runs, and those that Redis lacks.

    Results of sessions that have expired in Redis are left out.
    """
    namespace = site.stack.namespace
    recording = await read(site.brokers.amqp_url, namespace)
    results = [entry.message for entry in recording.entries() if isinstance(entry.message, Result)]
    wrong = []
    count = in_runs = 0
    async with Redis.from_url(site.brokers.redis_url) as redis:
        held = {
            name: unpack(await _bytes(redis, f"{namespace}:tokens:{name}")) for name in {one.session for one in results}
        }
    for one in results:
        if one.status is Status.COMMITTED and (tokens := held[one.session]):
            count += 1
            in_runs += one.run
            if tokens[one.base_len : one.base_len + len(one.tokens)] != one.tokens:
                wrong.append(f"{one.session}: a result of round {one.round} has {one.tokens} at {one.base_len}")
    return count, in_runs, wrong


async def _bytes(redis: Redis, key: str) -> bytes:
    found = await redis.get(key)
    return found if isinstance(found, bytes) else b""


async def dead_letters(site: ChaosSite) -> tuple[int, Mapping[str, int]]:
    """Take all dead letters; return the number of poison messages, and the number of others by reason."""
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
