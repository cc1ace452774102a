"""Faults of messages in RabbitMQ: duplicated, late, out of order or lost ones, and poison that no service sends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from shared.broker import topology
from shared.broker.topology import Topology
from shared.messages import (
    Batch,
    Cancel,
    CostModel,
    Finish,
    Generate,
    Heartbeat,
    HiddenStates,
    Job,
    Load,
    Message,
    Release,
    Residency,
    Result,
    Sampling,
    Status,
    Verify,
    encode,
)

MARK = "x-chaos"
"""Header of every message that this module publishes."""
COPIED, LATEST_COPY_S = 0.3, 1.5
"""Share of messages that are duplicated, and the latest time of a copy in seconds."""
DROPPED, LATEST_S = 0.2, 0.3
"""Share of rounds that are lost, and the longest delay of the others in seconds."""
RETRY_S = 0.2


async def duplicate(amqp_url: str, namespace: str, seed: int, for_s: float) -> None:
    """For `for_s` seconds, publish copies of some messages of every kind, up to `LATEST_COPY_S` later."""
    draw = random.Random(f"duplicates-{seed}")
    late: set[asyncio.Task[None]] = set()
    with suppress(*CONNECTION_EXCEPTIONS):  # RabbitMQ may be down, or go down
        async with await aio_pika.connect(amqp_url) as connection:
            channel = await connection.channel(publisher_confirms=False)
            exchange = await channel.get_exchange(Topology(namespace).exchange)
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(exchange, "#")

            async def again(message: AbstractIncomingMessage) -> None:
                await asyncio.sleep(draw.uniform(0, LATEST_COPY_S))
                with suppress(*CONNECTION_EXCEPTIONS):
                    await exchange.publish(_copy(message), message.routing_key or "")

            async def see(message: AbstractIncomingMessage) -> None:
                if MARK not in message.headers and draw.random() < COPIED:
                    late.add(task := asyncio.create_task(again(message)))
                    task.add_done_callback(late.discard)

            await queue.consume(see, no_ack=True)
            await asyncio.sleep(for_s)
            await asyncio.gather(*late)


async def lose_rounds(amqp_url: str, namespace: str, seed: int, for_s: float) -> None:
    """For `for_s` seconds, drop some rounds before the scheduler, and deliver the others late and out of order."""
    draw = random.Random(f"lost-{seed}")
    names = Topology(namespace)
    verify = names.verify_queue().name
    late: set[asyncio.Task[None]] = set()
    try:
        with suppress(*CONNECTION_EXCEPTIONS):
            async with await aio_pika.connect(amqp_url) as connection:
                channel = await connection.channel(publisher_confirms=False)
                queue = await channel.declare_queue(exclusive=True)

                async def pass_on(message: AbstractIncomingMessage) -> None:
                    await asyncio.sleep(draw.uniform(0, LATEST_S))
                    with suppress(*CONNECTION_EXCEPTIONS):
                        await channel.default_exchange.publish(_copy(message), verify)

                async def see(message: AbstractIncomingMessage) -> None:
                    if draw.random() >= DROPPED:
                        late.add(task := asyncio.create_task(pass_on(message)))
                        task.add_done_callback(late.discard)

                await queue.consume(see, no_ack=True)
                await queue.bind(names.exchange, topology.VERIFY)
                await _bind(channel, names, bound=False)
                await asyncio.sleep(for_s)
                await _bind(channel, names, bound=True)
                await asyncio.gather(*late)
    finally:
        await _mend(amqp_url, names)


async def _mend(amqp_url: str, names: Topology) -> None:
    """Bind the scheduler's queue again as soon as RabbitMQ answers."""
    while True:
        try:
            async with await aio_pika.connect(amqp_url) as connection:
                await _bind(await connection.channel(), names, bound=True)
                return
        except CONNECTION_EXCEPTIONS:
            await asyncio.sleep(RETRY_S)


async def _bind(channel: AbstractChannel, names: Topology, *, bound: bool) -> None:
    queue = names.verify_queue()
    declared = await channel.declare_queue(queue.name, durable=True, arguments=queue.arguments)
    await (declared.bind if bound else declared.unbind)(names.exchange, topology.VERIFY)


def _copy(message: AbstractIncomingMessage) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        headers={**message.headers, MARK: "copy"},
        content_type=message.content_type,
        delivery_mode=message.delivery_mode,
    )


async def poison(amqp_url: str, namespace: str, processes: Sequence[str]) -> int:
    """Send undecodable bytes, and well-formed messages about unknown sessions, to every queue.

    processes: names of the running processes. Returns the number of messages that no service can decode: each must
    become a dead letter.
    """
    keys = [topology.VERIFY, topology.SAMPLE, topology.LOAD, topology.CANCEL, topology.generate()]
    keys += [topology.RESULT_SCHEDULER, topology.heartbeat("x"), topology.costmodel("x")]
    keys += [topology.result(name) for name in processes if name.startswith(("drafter", "gateway"))]
    keys += [topology.batch(name) for name in processes if name.startswith("verifier")]
    bodies = [(key, body) for key in keys for body in (b"rubbish", b"\x81\xa1t\xa6Verify", b"")]
    bodies += [(key, encode(message)) for key, message in _nonsense(processes)]
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(Topology(namespace).exchange)
        for key, body in bodies:
            message = aio_pika.Message(body, headers={MARK: "poison"})
            await exchange.publish(message, key, mandatory=False)
    return 3 * len(keys)


NOBODY = "nobody"
"""Name of sessions and processes that do not exist."""
NO_ROUND: dict[str, Any] = {"session": NOBODY, "round": 3, "base_len": 7}
NO_MODEL: dict[str, Any] = {"drafter": NOBODY, "gateway": NOBODY, "fingerprint": "none"}


def _nonsense(processes: Sequence[str]) -> list[tuple[str, Message]]:
    """Return well-formed messages about sessions and verifiers that do not exist, each with its routing key."""
    result = Result(
        **NO_ROUND, status=Status.COMMITTED, verifier=NOBODY, batch="none", tokens=[2**30], finish=Finish.STOP, cached=9
    )
    states = HiddenStates(session=NOBODY, round=0, start=5, count=1, size=1, rows=b"\0\0")
    job = Job(**NO_ROUND, **NO_MODEL, draft=[2**30], drafted=1)
    batch = Batch(batch="none", scheduler=NOBODY, jobs=[job], predicted_ms=1.0, policy="none")
    made = [*_nonsense_about_work(), (topology.RESULT_SCHEDULER, result), *_nonsense_about_state()]
    for name in processes:
        if name.startswith(("drafter", "gateway")):
            made += [(topology.result(name), result), (topology.result(name), states)]
        elif name.startswith("verifier"):
            made += [(topology.batch(name), batch), (topology.batch(name), Release(sessions=[NOBODY]))]
    return made


def _nonsense_about_work() -> list[tuple[str, Message]]:
    generate = Generate(
        session=NOBODY,
        gateway=NOBODY,
        prompt=[1],
        sampling=Sampling(),
        stop_ids=[],
        max_tokens=1,
        fingerprint="none",
        vocab_fingerprint="none",
    )
    return [
        (topology.generate(), generate),
        (topology.VERIFY, Verify(**NO_ROUND, **NO_MODEL, draft=[2**30, 5], acceptance=[])),
        (topology.CANCEL, Cancel(session=NOBODY, reason="chaos")),
    ]


def _nonsense_about_state() -> list[tuple[str, Message]]:
    beat = Heartbeat(
        verifier=NOBODY,
        fingerprint="none",
        max_len=10**6,
        free_tokens=10**9,
        total_tokens=10**9,
        residency=[Residency(session=NOBODY, cached=5)],
    )
    model = CostModel(
        verifier=NOBODY, coefficients=[0.0] * 5, ratio_p50=1e-9, ratio_p90=1e-9, ratio_p99=1e9, samples=0, version=10**9
    )
    return [
        (topology.heartbeat(NOBODY), beat),
        (topology.costmodel(NOBODY), model),
        (topology.LOAD, Load(scheduler=NOBODY, price_ms=1e6, queue_ms=1e6, pending=10**6, draft_cap=0)),
    ]
