"""Declarations at RabbitMQ: exchanges, queues and the journal.

A process declares what it uses. A user with least privilege may not: the definitions that the operator imported
(`shared.broker.access`) hold its exchanges and shared queues, and the process only checks that they exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractQueue, AbstractRobustConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq.abc import AbstractChannel as PlainChannel
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)

from shared.broker.topology import JournalLimits, Queue, Topology
from shared.errors import BrokersError
from shared.runtime import logging

OWN_QUEUE_RETRIES = 20
OWN_QUEUE_RETRY_S = 0.5


@dataclass(frozen=True)
class Exchanges:
    """The declared exchanges of a process, and the channel for transient messages."""

    channel: AbstractChannel
    transient: AbstractExchange
    confirmed: AbstractExchange
    """The same exchange on a channel with publisher confirms."""
    dead_letters: AbstractExchange | None
    """None on a device, which may send no dead letters."""
    predeclared: bool
    """True if the exchanges come from imported definitions, because this user may not declare them."""


async def declare_exchanges(connection: AbstractRobustConnection, topology: Topology) -> Exchanges:
    """Declare the exchanges, or check that they exist. Raises BrokersError when one is missing."""
    channel = await connection.channel(publisher_confirms=False)
    confirming = await connection.channel(publisher_confirms=True, on_return_raises=True)
    topic, fanout = aio_pika.ExchangeType.TOPIC, aio_pika.ExchangeType.FANOUT
    device = topology.device
    outgoing, kind = (topology.rounds_exchange(device), fanout) if device else (topology.exchange, topic)
    predeclared = bool(device) or not await _may(
        connection, lambda plain: plain.exchange_declare(topology.exchange, exchange_type="topic", durable=True)
    )
    letters = None
    try:
        transient = await channel.declare_exchange(outgoing, kind, durable=True, passive=predeclared)
        confirmed = await confirming.declare_exchange(outgoing, kind, durable=True, passive=predeclared)
        if not device:
            letters = await channel.declare_exchange(topology.dead, fanout, durable=True, passive=predeclared)
        if letters is not None and not predeclared:
            dead = topology.dead_queue()
            await (await channel.declare_queue(dead.name, durable=True, arguments=dead.arguments)).bind(letters)
    except ChannelNotFoundEntity as error:
        raise _missing(error) from error
    return Exchanges(channel, transient, confirmed, letters, predeclared)


async def declare_journal(
    connection: AbstractRobustConnection, topology: Topology, exchanges: Exchanges, limits: JournalLimits
) -> AbstractExchange:
    """Declare the journal, its exchange and their bindings, now and after each reconnect; return the exchange.

    Raises BrokersError when the journal is missing and this user may not declare it.
    """
    queue = topology.journal_queue(limits)
    log = logging.get()
    try:
        exchange = await exchanges.channel.declare_exchange(
            queue.name, aio_pika.ExchangeType.TOPIC, durable=True, passive=exchanges.predeclared
        )
    except ChannelNotFoundEntity as error:
        raise _missing(error) from error
    if exchanges.predeclared:
        return exchange

    async def declare(*_: object) -> None:
        # On a channel that aio-pika does not restore: if the journal has changed meanwhile, the refusal must not keep
        # this process from reconnecting.
        channel = await connection.channel(publisher_confirms=False)
        try:
            plain = await channel.get_underlay_channel()
            await plain.queue_declare(queue.name, durable=True, arguments=queue.arguments)
            for source, key in [(topology.exchange, key) for key in queue.bindings] + [(queue.name, "#")]:
                await plain.queue_bind(queue.name, source, key)
        except ChannelPreconditionFailed as error:
            log.warning(
                "the journal keeps its old limits; delete it to apply new ones (wisp journal delete)", error=str(error)
            )
        except CONNECTION_EXCEPTIONS as error:
            log.warning("the journal could not be declared", error=repr(error))
        finally:
            with suppress(*CONNECTION_EXCEPTIONS):
                await channel.close()

    await declare()
    connection.reconnect_callbacks.add(declare)
    return exchange


async def declare_queue(
    connection: AbstractRobustConnection, topology: Topology, queue: Queue, prefetch: int
) -> tuple[AbstractQueue, bool]:
    """Declare a queue on a channel of its own; return it, and whether it comes from imported definitions.

    Raises BrokersError when the queue is missing, or belongs to another running process.
    """
    predeclared = not queue.exclusive and (
        bool(topology.device)
        or not await _may(
            connection,
            lambda plain: plain.queue_declare(queue.name, durable=queue.durable, arguments=queue.arguments),
        )
    )
    for attempt in range(OWN_QUEUE_RETRIES):
        channel = await connection.channel(publisher_confirms=False)
        if prefetch:
            await channel.set_qos(prefetch_count=prefetch)
        try:
            declared = await channel.declare_queue(
                queue.name,
                durable=queue.durable,
                exclusive=queue.exclusive,
                arguments=queue.arguments,
                passive=predeclared,
            )
            return declared, predeclared
        except ChannelNotFoundEntity as error:
            with suppress(*CONNECTION_EXCEPTIONS):
                await channel.close()
            raise _missing(error) from error
        except ChannelLockedResource:
            # A killed predecessor of the same name still holds the queue until RabbitMQ notices its end.
            logging.get().warning("own queue still held by a predecessor", queue=queue.name, attempt=attempt)
            await asyncio.sleep(OWN_QUEUE_RETRY_S)
    raise BrokersError(
        f"queue {queue.name} belongs to another running process; give this process another name (WISP_INSTANCE)"
    )


async def _may(connection: AbstractRobustConnection, declare: Callable[[PlainChannel], Awaitable[object]]) -> bool:
    """Return whether this user may make the declaration, by making it."""
    assert connection.transport is not None
    # On a channel of its own, because a refusal closes the channel; aio-pika does not restore this one.
    channel = await connection.transport.connection.channel()
    try:
        await declare(channel)
    except ChannelAccessRefused:
        return False
    await channel.close()
    return True


def _missing(error: ChannelNotFoundEntity) -> BrokersError:
    return BrokersError(
        f"RabbitMQ lacks an exchange or queue that this user may not declare ({error}); import the output of "
        "`wisp broker definitions`"
    )
