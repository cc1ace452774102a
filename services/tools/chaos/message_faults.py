"""A hand in RabbitMQ: messages twice, late, out of order, lost; and messages that nobody should have sent."""

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
"""Header of everything that was sent from here."""
COPIED, LATEST_COPY_S = 0.3, 1.5
DROPPED, LATEST_S = 0.2, 0.3
AGAIN_S = 0.2


async def duplicate(amqp_url: str, namespace: str, seed: int, for_s: float) -> None:
    """For a while, let some messages of every kind come again, up to `LATEST_COPY_S` later."""
    draw = random.Random(f"duplicates-{seed}")
    late: set[asyncio.Task[None]] = set()
    with suppress(*CONNECTION_EXCEPTIONS):  # RabbitMQ is away, or goes away
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
    """For a while, lose some rounds on their way to the scheduler, and let others come late and out of order."""
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
    """Let rounds reach the scheduler again, as soon as RabbitMQ answers."""
    while True:
        try:
            async with await aio_pika.connect(amqp_url) as connection:
                await _bind(await connection.channel(), names, bound=True)
                return
        except CONNECTION_EXCEPTIONS:
            await asyncio.sleep(AGAIN_S)


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
    """Send rubbish, and well-formed nonsense, to every queue. `processes` are the names of the running services'.

    Returns how many messages no service can decode, each of which has to become a dead letter.
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


def _nonsense(processes: Sequence[str]) -> list[tuple[str, Message]]:
    """Messages that are well-formed and make no sense: of sessions and verifiers that do not exist."""
    nobody = "nobody"
    common: dict[str, Any] = {"session": nobody, "round": 3, "base_len": 7}
    round_ = Verify(**common, draft=[2**30, 5], acceptance=[], drafter=nobody, gateway=nobody, fingerprint="none")
    job = Job(**common, draft=[2**30], drafted=1, drafter=nobody, gateway=nobody, fingerprint="none")
    result = Result(
        **common, status=Status.COMMITTED, verifier=nobody, batch="none", tokens=[2**30], finish=Finish.STOP, cached=9
    )
    beat = Heartbeat(
        verifier=nobody,
        fingerprint="none",
        max_len=10**6,
        free_tokens=10**9,
        total_tokens=10**9,
        residency=[Residency(session=nobody, cached=5)],
    )
    model = CostModel(
        verifier=nobody, coefficients=[0.0] * 5, ratio_p50=1e-9, ratio_p90=1e-9, ratio_p99=1e9, samples=0, version=10**9
    )
    states = HiddenStates(session=nobody, round=0, start=5, count=1, size=1, rows=b"\0\0")
    generate = Generate(
        session=nobody,
        gateway=nobody,
        prompt=[1],
        sampling=Sampling(),
        stop_ids=[],
        max_tokens=1,
        fingerprint="none",
        vocab_fingerprint="none",
    )
    load = Load(scheduler=nobody, price_ms=1e6, queue_ms=1e6, pending=10**6, draft_cap=0)
    made: list[tuple[str, Message]] = [
        (topology.VERIFY, round_),
        (topology.RESULT_SCHEDULER, result),
        (topology.heartbeat(nobody), beat),
        (topology.costmodel(nobody), model),
        (topology.generate(), generate),
        (topology.LOAD, load),
        (topology.CANCEL, Cancel(session=nobody, reason="chaos")),
    ]
    for name in processes:
        if name.startswith(("drafter", "gateway")):
            made += [(topology.result(name), result), (topology.result(name), states)]
        elif name.startswith("verifier"):
            batch = Batch(batch="none", scheduler=nobody, jobs=[job], predicted_ms=1.0, policy="none")
            made += [(topology.batch(name), batch), (topology.batch(name), Release(sessions=[nobody]))]
    return made
