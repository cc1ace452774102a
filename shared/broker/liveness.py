"""Proofs that a connection to RabbitMQ works: its queues answer, and its consumers are alive."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from uuid import uuid4

import aio_pika
import aiormq
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage, AbstractQueue, AbstractRobustConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from shared.broker.connection import in_words, losses_as_errors
from shared.broker.declarations import check_queue, no_answer
from shared.broker.topology import Queue, Topology, probe_key
from shared.errors import BrokersError

PROBE_HEADER = "x-wisp-probe"


@dataclass(frozen=True)
class Consumer:
    """A consumer of this process."""

    queue: Queue
    declared: AbstractQueue
    tag: str
    """RabbitMQ's name of the consumer on its channel."""


class Liveness:
    """Checks of one connection."""

    def __init__(self, connection: AbstractRobustConnection, topology: Topology, transient: AbstractExchange) -> None:
        """transient: the exchange of messages without confirmation, to which probes are published."""
        self._connection = connection
        self._topology = topology
        self._transient = transient
        self._probes: dict[str, asyncio.Future[None]] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self.consumers: list[Consumer] = []

    def takes_probe(self, queue: Queue, incoming: AbstractIncomingMessage) -> bool:
        """Return whether a message of the queue is a probe, after telling the `prove` that waits for it."""
        # By the routing key, for which RabbitMQ checks permissions: a message with this key is never handled.
        if incoming.routing_key != probe_key(queue.name):
            return False
        probe = str(incoming.headers.get(PROBE_HEADER))
        if (waiting := self._probes.pop(probe, None)) and not waiting.done():
            waiting.set_result(None)
        return True

    async def prove(self, queue: Queue, timeout_s: float = 5.0) -> None:
        """Check that this process's consumer of `queue` is alive, by a round trip through RabbitMQ.

        Raises BrokersError when the probe does not come back in time.
        """
        probe = uuid4().hex
        self._probes[probe] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                with losses_as_errors():
                    await self._transient.publish(
                        aio_pika.Message(b"", headers={PROBE_HEADER: probe}), probe_key(queue.name)
                    )
                await self._probes[probe]
        except CONNECTION_EXCEPTIONS as error:  # TimeoutError, for a late probe, is one of them
            raise BrokersError(f"the consumer of queue {queue.name} does not answer: {in_words(error)}") from error
        finally:
            self._probes.pop(probe, None)

    async def takes_messages(self) -> bool:
        """Return whether RabbitMQ reads from this connection: during a memory or disk alarm it does not."""
        transport = self._connection.transport
        if not self._is_connected or transport is None:
            return False
        try:
            async with asyncio.timeout(0.1):
                await transport.connection.ready()
        except TimeoutError:
            return False
        return True

    async def prove_consumers(self, timeout_s: float = 5.0) -> None:
        """Check that all consumers of this process are alive. Raises BrokersError for the first that is not.

        An own queue is checked by a round trip. A probe of a shared queue could reach another process, so there the
        queue must answer (else QueueDown is raised) and the consumer must still be registered: RabbitMQ cancels it when
        the queue is deleted, for example.
        """
        if not self._is_connected:
            raise BrokersError("no connection to RabbitMQ")
        for consumer in sorted(self.consumers, key=lambda one: not one.queue.exclusive):
            try:
                # A device may not publish to its own queue, so a round trip is impossible.
                if consumer.queue.exclusive and not self._topology.device:
                    await self.prove(consumer.queue, timeout_s)
                else:
                    await self._prove_registered(consumer, timeout_s)
            except BrokersError as error:
                if self._is_connected and not await self.takes_messages():
                    raise BrokersError("RabbitMQ accepts no messages now; see its memory and disk alarms") from error
                raise

    async def _prove_registered(self, consumer: Consumer, timeout_s: float) -> None:
        queue = consumer.queue
        try:
            async with asyncio.timeout(timeout_s):
                channel = await consumer.declared.channel.get_underlay_channel()
        except CONNECTION_EXCEPTIONS as error:
            raise BrokersError(f"the channel of queue {queue.name} is not open: {in_words(error)}") from error
        if not queue.exclusive:
            await self.check_queue(queue, timeout_s)
        assert isinstance(channel, aiormq.Channel)
        if consumer.tag not in channel.consumers:
            raise BrokersError(f"RabbitMQ has cancelled the consumer of queue {queue.name}")

    async def check_queue(self, queue: Queue, timeout_s: float = 5.0) -> None:
        """Check that a shared queue answers. Raises QueueDown where it does not: its RabbitMQ node may be down.

        Passes for a missing queue, and where this user may not ask.
        """
        asked = self._checks.get(queue.name)
        if asked is None or asked.done():
            # Not given up when the time is over: RabbitMQ may answer after a minute, and the next check waits as well.
            asked = self._checks[queue.name] = asyncio.create_task(check_queue(self._connection, queue))
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({asked}, timeout=timeout_s)
        if not asked.done():
            raise no_answer(queue)
        try:
            asked.result()
        except CONNECTION_EXCEPTIONS as error:
            raise BrokersError(f"queue {queue.name} cannot be checked: {in_words(error)}") from error

    @property
    def _is_connected(self) -> bool:
        return self._connection.connected.is_set()
