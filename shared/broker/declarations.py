"""Declarations at RabbitMQ: exchanges, queues and the journal.

A process declares what it uses. A user with least privilege may not: the definitions that the operator imported
(`shared.broker.access`) hold its exchanges and shared queues, and the process only checks that they exist.
"""

from __future__ import annotations

import asyncio
import re
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

from shared.broker.confirmed import ConfirmedExchange
from shared.broker.connection import PROBE_S, answer, in_words, passing_channel
from shared.broker.topology import JournalLimits, Queue, Topology
from shared.errors import AccessRefused, BrokersError, QueueDown
from shared.runtime import logging

OWN_QUEUE_RETRIES = 20
OWN_QUEUE_RETRY_S = 0.5
ANSWER_S = 10.0
"""Longest wait for the declaration of a shared queue. For a queue on a node that does not run, RabbitMQ 4.3 answers
after more than a minute (77 s on a test machine); earlier versions refuse it at once."""


@dataclass(frozen=True)
class Exchanges:
    """The declared exchanges of a process, and the channel for transient messages."""

    channel: AbstractChannel
    transient: AbstractExchange
    confirmed: ConfirmedExchange
    """The same exchange on a channel with publisher confirms."""
    dead_letters: AbstractExchange | None
    """None on a device, which may send no dead letters."""
    predeclared: bool
    """True if the exchanges come from imported definitions, because this user may not declare them."""


async def declare_exchanges(connection: AbstractRobustConnection, topology: Topology) -> Exchanges:
    """Declare the exchanges, or check that they exist. Raises BrokersError when one is missing."""
    channel = await connection.channel(publisher_confirms=False)
    topic, fanout = aio_pika.ExchangeType.TOPIC, aio_pika.ExchangeType.FANOUT
    device = topology.device
    if device or not await _may(
        connection, lambda plain: plain.exchange_declare(topology.exchange, exchange_type="topic", durable=True)
    ):
        outgoing = topology.rounds_exchange(device) if device else topology.exchange
        for name in (outgoing,) if device else (outgoing, topology.dead):
            await _check_exchange(connection, name)
        return Exchanges(
            channel,
            await channel.get_exchange(outgoing, ensure=False),
            await ConfirmedExchange.open(connection, outgoing),
            None if device else await channel.get_exchange(topology.dead, ensure=False),
            predeclared=True,
        )
    transient = await channel.declare_exchange(topology.exchange, topic, durable=True)
    confirmed = await ConfirmedExchange.open(connection, topology.exchange)
    letters = await channel.declare_exchange(topology.dead, fanout, durable=True)

    async def declare_dead_queue(plain: PlainChannel) -> None:
        queue = topology.dead_queue()
        await plain.queue_declare(queue.name, durable=True, arguments=queue.arguments)
        await plain.queue_bind(queue.name, topology.dead, "")

    await _now_and_after_reconnects(connection, topology.dead, declare_dead_queue)
    return Exchanges(channel, transient, confirmed, letters, predeclared=False)


async def declare_journal(
    connection: AbstractRobustConnection, topology: Topology, exchanges: Exchanges, limits: JournalLimits
) -> AbstractExchange | None:
    """Declare the journal, its exchange and their bindings, now and after each reconnect.

    Returns the exchange, or None where this user may publish nothing to it, because its service sends no confirmed
    messages. Raises BrokersError when the journal is missing and this user may not declare it.
    """
    queue = topology.journal_queue(limits)
    if exchanges.predeclared:
        try:
            await _check_exchange(connection, queue.name)
        except AccessRefused:
            logging.get().debug("this process publishes nothing to the journal")
            return None
        return await exchanges.channel.get_exchange(queue.name, ensure=False)
    exchange = await exchanges.channel.declare_exchange(queue.name, aio_pika.ExchangeType.TOPIC, durable=True)

    async def declare(plain: PlainChannel) -> None:
        await plain.queue_declare(queue.name, durable=True, arguments=queue.arguments)
        for source, key in [(topology.exchange, key) for key in queue.bindings] + [(queue.name, "#")]:
            await plain.queue_bind(queue.name, source, key)

    await _now_and_after_reconnects(
        connection,
        queue.name,
        declare,
        "the journal keeps its old limits; delete it to apply new ones (wisp journal delete)",
    )
    return exchange


async def _now_and_after_reconnects(
    connection: AbstractRobustConnection,
    name: str,
    declare: Callable[[PlainChannel], Awaitable[None]],
    differs: str = "the queue keeps its earlier arguments",
) -> None:
    """Declare a queue that the connection does not depend on. What RabbitMQ refuses is logged.

    differs: log message if the queue exists with other arguments.
    """
    log = logging.get()

    async def attempt() -> None:
        # On a channel that aio-pika does not restore: a refusal must not keep this process from reconnecting.
        try:
            async with passing_channel(connection) as plain:
                await declare(plain)
        except ChannelPreconditionFailed as error:
            log.warning(differs, queue=name, error=in_words(error))
        except CONNECTION_EXCEPTIONS as error:
            log.warning("a queue could not be declared", queue=name, error=in_words(error))

    async def attempt_within(wait_s: float) -> None:
        try:
            await answer(attempt(), wait_s)
        except TimeoutError:
            log.warning("a queue is not declared yet: RabbitMQ does not answer", queue=name)

    async def again(*_: object) -> None:
        # What else waits for the reconnect does not need this queue.
        await attempt_within(PROBE_S)

    await attempt_within(ANSWER_S)
    connection.reconnect_callbacks.add(again)


async def declare_queue(
    connection: AbstractRobustConnection, topology: Topology, queue: Queue, prefetch: int
) -> tuple[AbstractQueue, bool]:
    """Declare a queue on a channel of its own; return it, and whether it comes from imported definitions.

    A shared queue that exists with other arguments is used as it is. Raises QueueDown where its node does not run, and
    BrokersError when the queue is missing or belongs to another running process.
    """
    exists = not queue.exclusive and (bool(topology.device) or not await _may_declare(connection, queue))
    if exists:
        await _require(connection, queue)
    for attempt in range(OWN_QUEUE_RETRIES):
        channel = await connection.channel(publisher_confirms=False)
        if prefetch:
            await channel.set_qos(prefetch_count=prefetch)
        try:
            # Not bounded: a shared queue has just answered, and an own one is on the node of this connection.
            declared = await channel.declare_queue(
                queue.name,
                durable=queue.durable,
                exclusive=queue.exclusive,
                arguments=queue.arguments,
                passive=exists,
            )
            return declared, exists
        except ChannelNotFoundEntity as error:
            with suppress(*CONNECTION_EXCEPTIONS):
                await channel.close()
            raise _absent(error) from error
        except ChannelLockedResource:
            # A killed predecessor of the same name still holds the queue until RabbitMQ notices its end.
            logging.get().warning("own queue still held by a predecessor", queue=queue.name, attempt=attempt)
            await asyncio.sleep(OWN_QUEUE_RETRY_S)
    raise BrokersError(
        f"queue {queue.name} belongs to another running process; give this process another name (WISP_INSTANCE)"
    )


def no_answer(queue: Queue) -> QueueDown:
    """Return the error for a shared queue for which RabbitMQ does not answer."""
    return QueueDown(
        f"RabbitMQ does not answer for queue {queue.name}: it may be on a node that does not run; start that node "
        "again. Replicated queues outlive it (WISP_REPLICATED_QUEUES)"
    )


async def check_queue(connection: AbstractRobustConnection, queue: Queue) -> None:
    """Raise QueueDown if a queue's node does not run. Passes for a missing queue, and where this user may not ask."""
    try:
        await _ask_for(connection, queue)
    except ChannelNotFoundEntity as error:
        if isinstance(absent := _absent(error), QueueDown):
            raise absent from error
    except ChannelAccessRefused:
        pass


async def _require(connection: AbstractRobustConnection, queue: Queue) -> None:
    """Raise QueueDown where a shared queue's node does not run, and BrokersError when the queue is missing."""
    try:
        await answer(_ask_for(connection, queue), ANSWER_S)
    except TimeoutError as error:
        raise no_answer(queue) from error
    except ChannelNotFoundEntity as error:
        raise _absent(error) from error


async def _ask_for(connection: AbstractRobustConnection, queue: Queue) -> None:
    async with passing_channel(connection) as plain:
        await plain.queue_declare(queue.name, passive=True)


async def _may_declare(connection: AbstractRobustConnection, queue: Queue) -> bool:
    """Return whether this user may declare the queue with these arguments, by declaring it."""
    declaring = _may(
        connection, lambda plain: plain.queue_declare(queue.name, durable=queue.durable, arguments=queue.arguments)
    )
    try:
        return await answer(declaring, ANSWER_S)
    except TimeoutError as error:
        raise no_answer(queue) from error
    except ChannelPreconditionFailed as error:
        logging.get().warning(
            "a queue exists with other arguments and is used as it is; to apply new ones, stop all services and delete "
            "it",
            queue=queue.name,
            error=in_words(error),
        )
        return False
    except ChannelNotFoundEntity as error:
        raise _absent(error) from error


async def _check_exchange(connection: AbstractRobustConnection, name: str) -> None:
    """Raise BrokersError if an exchange is missing, and AccessRefused if this user may not publish to it.

    Since version 4.3 RabbitMQ answers a passive declaration only to users with more rights than to publish. So where
    that is refused, a message is published in a transaction that is rolled back.
    """
    try:
        try:
            async with passing_channel(connection) as plain:
                await plain.exchange_declare(name, passive=True)
        except ChannelAccessRefused:
            await _publish_and_roll_back(connection, name)
    except ChannelNotFoundEntity as error:
        raise _absent(error) from error
    except ChannelAccessRefused as error:
        raise AccessRefused(
            f"RabbitMQ lacks an exchange, or refuses it to this user ({in_words(error)}); import the output of "
            "`wisp broker definitions`"
        ) from error


async def may_publish(connection: AbstractRobustConnection, exchange: str, key: str) -> bool:
    """Return whether this user may publish to the exchange with this key."""
    try:
        await _publish_and_roll_back(connection, exchange, key)
    except ChannelAccessRefused:
        return False
    return True


async def _publish_and_roll_back(connection: AbstractRobustConnection, exchange: str, key: str = "") -> None:
    """Publish a message in a transaction that is rolled back. Raises the refusals of a publication."""
    async with passing_channel(connection) as plain:
        await plain.tx_select()
        await plain.basic_publish(b"", exchange=exchange, routing_key=key)
        await plain.tx_rollback()


async def _may(connection: AbstractRobustConnection, declare: Callable[[PlainChannel], Awaitable[object]]) -> bool:
    """Return whether this user may make the declaration, by making it."""
    try:
        async with passing_channel(connection) as plain:
            await declare(plain)
    except ChannelAccessRefused:
        return False
    return True


def _absent(error: ChannelNotFoundEntity) -> BrokersError:
    """Return the error for a queue or exchange that RabbitMQ does not find."""
    text = in_words(error)
    if re.search(r"no (queue|exchange) ", text):
        return BrokersError(
            f"RabbitMQ lacks an exchange or queue that this user may not declare ({text}); import the output of "
            "`wisp broker definitions`"
        )
    return QueueDown(
        f"RabbitMQ holds a queue on a node that does not run ({text}); start that node again. Replicated queues "
        "outlive it (WISP_REPLICATED_QUEUES)"
    )
