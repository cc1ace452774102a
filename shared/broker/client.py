"""RabbitMQ client: a connection that publishes and consumes messages. A process has one, a verifier two.

*Persistent* messages (Generate) are confirmed by RabbitMQ before `publish` returns. All messages of a round are
*transient*: they go to the socket without a confirmation, because the drafter's round timeout repairs a loss. For the
same reason they are consumed without acknowledgement. A persistent message is acknowledged when its handler returns;
if the process dies first, RabbitMQ delivers it to another consumer.

The journal gets its copies by bindings. Only confirmed messages are published to it here, because a binding for them
would hide that their receiver is away (see `shared.broker.topology`).

After a lost connection aio-pika restores channels, queues, bindings and consumers; `shared.broker.liveness` checks that
it did.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import aio_pika
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage, AbstractQueue, AbstractRobustConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, PublishError
from aiormq.exceptions import AMQPChannelError, ChannelAccessRefused
from pamqp.common import FieldTable

from shared.broker import metrics
from shared.broker.connection import (
    LISTEN_RETRY_S,
    RECONNECT_INTERVAL_S,
    addresses,
    connect_robustly,
    in_words,
    losses_as_errors,
    until_listening,
    without_password,
)
from shared.broker.declarations import (
    Exchanges,
    declare_exchanges,
    declare_journal,
    declare_queue,
    may_publish,
)
from shared.broker.incoming import GiveBack, Handler, IncomingMessages, UntrustedSender
from shared.broker.liveness import Consumer, Liveness
from shared.broker.topology import JournalLimits, Queue, Topology
from shared.errors import AccessRefused, BrokersError, QueueDown, Unroutable
from shared.messages import Message, encode, encode_group
from shared.runtime import logging, tracing
from shared.runtime.tls import Tls, bad_certificate

CONNECT_TIMEOUT_S = 30
PUBLISH_TIMEOUT_S = 10
"""Longest time for a message that is sent once."""
PERSISTENT_TIMEOUT_S = 20
"""Longest time for a persistent message with its repetitions. A cluster goes on some 8 s after one of its nodes hangs,
and a connection is restored at another node after 5 to 7 s."""
CONFIRM_S = 4.0
"""Longest time without a confirmation of messages with the same key before a persistent one is repeated."""
PUBLISH_RETRY_S = 0.2
RETRIED_S = 30.0
"""Longest time for which a request to RabbitMQ is repeated: a queue's node may be starting."""
SENT_HEADER = "x-wisp-sent-us"
"""Header with a message's sending time, in microseconds since 1970 by the sender's clock. Only `wisp replay` reads
it."""

T = TypeVar("T")


class Broker:
    """A connection to RabbitMQ, in one namespace."""

    def __init__(
        self,
        connection: AbstractRobustConnection,
        topology: Topology,
        exchanges: Exchanges,
        journal: AbstractExchange | None,
    ) -> None:
        self.topology = topology
        self._connection = connection
        self._exchanges = exchanges
        self._journal = journal
        self._incoming = IncomingMessages(exchanges.dead_letters)
        self._log = logging.get()
        self._queues: dict[str, AbstractQueue] = {}
        self.liveness = Liveness(connection, topology, exchanges.transient)
        """Proves that RabbitMQ and the consumers of this connection are alive."""

    @classmethod
    async def connect(
        cls, url: str, topology: Topology, name: str, journal: JournalLimits | None = None, tls: Tls | None = None
    ) -> Broker:
        """Connect and declare the exchanges. `name` appears in RabbitMQ's list of connections.

        `url` may be several, separated by commas: they are tried in turn. With `journal`, messages are recorded. Raises
        BrokersError when nothing answers for 30 seconds, and at once for an invalid server certificate.
        """
        context = (tls or Tls()).context() if "amqps:" in url else None
        last: Exception = TimeoutError()

        def note(error: Exception) -> None:
            nonlocal last
            last = error

        async def attempt() -> Broker:
            order = addresses(url)
            while True:
                await until_listening(url, note)
                try:
                    connection = await connect_robustly(order, name, context)
                    try:
                        exchanges = await declare_exchanges(connection, topology)
                        record = await declare_journal(connection, topology, exchanges, journal) if journal else None
                        return cls(connection, topology, exchanges, record)
                    except BaseException:
                        await connection.close()
                        raise
                except AMQPChannelError:
                    raise  # a refusal would be repeated
                except (QueueDown, *CONNECTION_EXCEPTIONS) as error:
                    note(error)
                    if (bad := bad_certificate(error)) is not None:
                        raise BrokersError(
                            f"RabbitMQ at {without_password(url)} cannot be trusted: {bad}; see WISP_TLS_CA_FILE"
                        ) from error
                    order = [*order[1:], order[0]]
                    await asyncio.sleep(LISTEN_RETRY_S)

        try:
            return await asyncio.wait_for(attempt(), CONNECT_TIMEOUT_S)
        except TimeoutError:
            if isinstance(last, QueueDown):
                raise last from None
            raise BrokersError(
                f"RabbitMQ cannot be used at {without_password(url)} ({in_words(last)}); start it, or set WISP_AMQP_URL"
            ) from last

    async def publish(
        self,
        message: Message,
        key: str,
        *,
        cc: tuple[str, ...] = (),
        persistent: bool = False,
        confirmed: bool = False,
        trace: tracing.Headers | None = None,
    ) -> None:
        """Publish once; RabbitMQ copies the message to every queue bound to `key` or to a key in `cc`.

        trace: headers of the span that the message belongs to.

        Without a connection, a transient message is dropped with a warning. A confirmed one (persistent ones always
        are) raises Unroutable when no queue is bound to its key, and BrokersError when RabbitMQ does not confirm it. A
        persistent one is repeated for `PERSISTENT_TIMEOUT_S` before that, so it may arrive twice.
        """
        envelope = _envelope(encode(message), cc, persistent=persistent, trace=trace)
        metrics.PUBLISHED.labels(message.type_name).inc()
        if not (confirmed or persistent):
            await self._publish_transient(envelope, key)
            return
        if self._journal is not None:
            with suppress(*CONNECTION_EXCEPTIONS):
                async with asyncio.timeout(CONFIRM_S):
                    with losses_as_errors():
                        await self._journal.publish(envelope, key, mandatory=False)
        give_up_s = time.monotonic() + (PERSISTENT_TIMEOUT_S if persistent else PUBLISH_TIMEOUT_S)
        while True:
            try:
                left_s = max(PUBLISH_RETRY_S, give_up_s - time.monotonic())
                await self._exchanges.confirmed.publish(envelope, key, left_s, CONFIRM_S if persistent else None)
                return
            except PublishError as error:
                raise Unroutable(f"no queue is bound to {key!r}: its receiver is not running") from error
            except CONNECTION_EXCEPTIONS as error:
                if not persistent or time.monotonic() + PUBLISH_RETRY_S >= give_up_s:
                    raise BrokersError(
                        f"RabbitMQ did not confirm a {message.type_name} message: {in_words(error)}"
                    ) from error
                self._log.info("message not confirmed yet", key=key, error=in_words(error))
            await asyncio.sleep(PUBLISH_RETRY_S)

    async def publish_group(self, messages: Sequence[Message], key: str, *, cc: tuple[str, ...] = ()) -> None:
        """Publish transient messages with the same receivers as one. All receivers must read groups."""
        metrics.PUBLISHED.labels(messages[0].type_name).inc()
        await self._publish_transient(_envelope(encode_group(messages), cc), key)

    async def _publish_transient(self, envelope: aio_pika.Message, key: str) -> None:
        try:
            with losses_as_errors():
                await self._exchanges.transient.publish(envelope, key, mandatory=False, timeout=PUBLISH_TIMEOUT_S)
        except CONNECTION_EXCEPTIONS as error:
            self._log.warning("message dropped: no connection", key=key, error=in_words(error))

    async def consume(
        self,
        queue: Queue,
        handler: Handler,
        *,
        prefetch: int = 0,
        priority: int = 0,
        sender: UntrustedSender | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """Declare `queue` and call `handler` with each of its messages until the returned function is called.

        Consuming goes on after reconnects. With `prefetch`, messages are acknowledged when their handler returns, at
        most `prefetch` at a time; without, RabbitMQ counts them as done on delivery. A message that cannot be decoded,
        or whose handler fails, is dead-lettered with the reason and the original headers; one whose handler raises
        `GiveBack` returns to the queue, if it is acknowledged at all. With an untrusted `sender`, a message that is too
        long or cannot be decoded is refused and dropped.

        A consumer gets messages only while those of a higher `priority` are away or have `prefetch` messages each.
        """

        async def receive(incoming: AbstractIncomingMessage) -> None:
            if not self.liveness.takes_probe(queue, incoming):
                try:
                    await self._incoming.handle(incoming, handler, sender)
                except GiveBack:
                    if prefetch:
                        with suppress(*CONNECTION_EXCEPTIONS):
                            await incoming.nack(requeue=True)
                    return
            if prefetch:
                with suppress(*CONNECTION_EXCEPTIONS):  # RabbitMQ delivers it again after the reconnect
                    await incoming.ack()

        try:
            declared, tag = await self._retried(
                lambda: self._consume(queue, receive, prefetch, priority), f"queue {queue.name} cannot be consumed"
            )
        except ChannelAccessRefused as error:
            raise AccessRefused(
                f"RabbitMQ refuses queue {queue.name} to this user ({in_words(error)}); import the output of "
                "`wisp broker definitions`, again after each update"
            ) from error
        self._queues[queue.name] = declared
        consumer = Consumer(queue, declared, tag)
        self.liveness.consumers.append(consumer)

        async def end() -> None:
            self.liveness.consumers.remove(consumer)
            await declared.cancel(tag)
            await declared.channel.close()

        return end

    async def _consume(
        self, queue: Queue, receive: Callable[[AbstractIncomingMessage], Awaitable[None]], prefetch: int, priority: int
    ) -> tuple[AbstractQueue, str]:
        """Declare, bind and consume the queue; return it with the consumer's tag."""
        declared, predeclared = await declare_queue(self._connection, self.topology, queue, prefetch)
        try:
            for key in () if predeclared else queue.bindings:
                await declared.bind(self.topology.exchange, key)
            arguments: FieldTable | None = {"x-priority": priority} if priority else None
            return declared, await declared.consume(receive, no_ack=not prefetch, arguments=arguments)
        except BaseException:
            with suppress(*CONNECTION_EXCEPTIONS):
                await declared.channel.close()
            raise

    async def _retried(self, ask: Callable[[], Awaitable[T]], failure: str) -> T:
        """Send a request to RabbitMQ; repeat it while connection or queue are away. Raises BrokersError.

        A refusal (AMQPChannelError) would be repeated, so it is raised at once.
        """
        give_up_s = time.monotonic() + RETRIED_S
        while True:
            try:
                return await ask()
            except AMQPChannelError:
                raise
            except (QueueDown, *CONNECTION_EXCEPTIONS) as error:
                if time.monotonic() >= give_up_s:
                    raise BrokersError(f"{failure}: {in_words(error)}") from error
                self._log.warning("RabbitMQ is asked again", failure=failure, error=in_words(error))
                await asyncio.sleep(RECONNECT_INTERVAL_S)

    async def bind(self, queue: Queue, key: str) -> None:
        """Bind a queue consumed here to `key` too, now and after reconnects. Raises BrokersError."""
        try:
            with losses_as_errors():
                await self._queues[queue.name].bind(self.topology.exchange, key, timeout=PUBLISH_TIMEOUT_S)
        except CONNECTION_EXCEPTIONS as error:
            raise BrokersError(f"RabbitMQ did not bind queue {queue.name} to {key!r}: {in_words(error)}") from error

    async def unbind(self, queue: Queue, key: str) -> None:
        """Undo `bind`. Raises BrokersError."""
        try:
            with losses_as_errors():
                await self._queues[queue.name].unbind(self.topology.exchange, key, timeout=PUBLISH_TIMEOUT_S)
        except CONNECTION_EXCEPTIONS as error:
            raise BrokersError(f"RabbitMQ did not unbind queue {queue.name} from {key!r}: {in_words(error)}") from error

    async def may_publish(self, key: str) -> bool:
        """Return whether this user may publish to `key`, tried on a channel that the refusal closes.

        Definitions that were imported for an earlier version may lack the key. Raises BrokersError when RabbitMQ is
        away for `RETRIED_S`.
        """
        return await self._retried(
            lambda: may_publish(self._connection, self.topology.exchange, key),
            f"RabbitMQ did not answer whether this user may publish to {key!r}",
        )

    @property
    def connected(self) -> bool:
        """True if the connection is up. While it is down, aio-pika reconnects."""
        return self._connection.connected.is_set()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call back each time the connection is restored, with its queues. Messages sent before may be lost."""

        def restored(*_: object) -> None:
            callback()

        self._connection.reconnect_callbacks.add(restored)

    async def close(self) -> None:
        """Close the connection. RabbitMQ delivers unacknowledged messages to other consumers."""
        await self._connection.close()


def _envelope(
    body: bytes, cc: tuple[str, ...], *, persistent: bool = False, trace: tracing.Headers | None = None
) -> aio_pika.Message:
    headers: dict[str, Any] = {SENT_HEADER: time.time_ns() // 1000}
    if trace:
        headers.update(trace)
    if cc:
        headers["CC"] = list(cc)
    return aio_pika.Message(
        body,
        headers=headers,
        content_type="application/msgpack",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT if persistent else aio_pika.DeliveryMode.NOT_PERSISTENT,
    )
