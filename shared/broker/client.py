"""Talking to RabbitMQ: one connection per process, messages in and out, nothing decided here.

*Persistent* messages (Generate) are confirmed by the broker before `publish` returns. Everything of a round is
*transient*: it is handed to the socket and forgotten, because the drafter's round timeout repairs any loss. Transient
messages are consumed without acknowledgement for the same reason; persistent ones are acknowledged when their handler
returns, and given to another consumer when the process dies before that.

With the journal on, the broker makes its copies by bindings; only of a confirmed message a copy is published here,
since a binding for it would hide that its receiver is away (see `shared.broker.topology`).

After a lost connection aio-pika restores channels, queues, bindings and consumers; `prove` shows that it really did.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aio_pika
import aiormq
import structlog
from aio_pika.abc import (
    AbstractChannel,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueue,
    AbstractRobustConnection,
)
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, PublishError
from aiormq.abc import AbstractChannel as PlainChannel
from aiormq.exceptions import (
    AMQPChannelError,
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)

from shared.broker.topology import JournalLimits, Queue, Topology, probe_key
from shared.errors import BrokersError, MessageError, Unroutable
from shared.messages import Message, decode, encode
from shared.runtime import logging
from shared.runtime.tls import Tls, bad_certificate

CONNECT_TIMEOUT_S = 30
PUBLISH_TIMEOUT_S = 10
RECONNECT_INTERVAL_S = 1
HEARTBEAT_S = 10
"""A process that is silent for two of these is gone for RabbitMQ, which gives its messages to others: so long does a
frozen scheduler keep its standby waiting. `?heartbeat=` in the URL sets another time."""
OWN_QUEUE_RETRIES = 20
CONSUME_RETRIES = 30
PROBE_HEADER = "x-wisp-probe"
SENT_HEADER = "x-wisp-sent-us"
"""When a message was sent: microseconds since 1970 by its sender's clock. It is for `wisp replay`, nothing needs it."""

Handler = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Stranger:
    """Somebody who is not trusted with the dead letters: whose queue it is that messages come from."""

    longest: int
    """Bytes of a message at most."""
    refused: Callable[[str], Awaitable[None]]
    """Told why a message was not taken."""


class Broker:
    """A connection to the broker, in one namespace."""

    def __init__(
        self,
        connection: AbstractRobustConnection,
        topology: Topology,
        fast: AbstractChannel,
        exchanges: tuple[AbstractExchange, AbstractExchange],
        letters: AbstractExchange | None,
        given: bool,
    ) -> None:
        """letters: the exchange of dead letters, None for who may send none. given: the exchanges were declared by
        those who gave this user its permissions."""
        self.topology = topology
        self._connection = connection
        self._fast = fast
        self._fast_exchange, self._sure_exchange = exchanges
        self._dead_exchange = letters
        self._given = given
        self._journal: AbstractExchange | None = None
        self._log = logging.get()
        self._probes: dict[str, asyncio.Future[None]] = {}
        self._queues: dict[str, AbstractQueue] = {}
        self._consumed: list[tuple[Queue, AbstractQueue, str]] = []

    @classmethod
    async def connect(
        cls, url: str, topology: Topology, name: str, journal: JournalLimits | None = None, tls: Tls | None = None
    ) -> Broker:
        """Connect and declare the exchanges. `name` is shown in the broker's list of connections.

        With `journal`, messages are recorded. Raises BrokersError when nothing answers for 30 seconds, and at once when
        the server's certificate is not good.
        """
        context = (tls or Tls()).context() if url.startswith("amqps:") else None
        last: Exception = TimeoutError("no answer")
        options: dict[str, Any] = {} if "heartbeat=" in url else {"heartbeat": HEARTBEAT_S}

        async def attempt() -> Broker:
            nonlocal last
            while True:
                try:
                    connection = await aio_pika.connect_robust(
                        url,
                        reconnect_interval=RECONNECT_INTERVAL_S,
                        client_properties={"connection_name": name},
                        **options,
                        ssl_context=context,
                    )
                    try:
                        return await cls._open(connection, topology, journal)
                    except BaseException:
                        await connection.close()
                        raise
                except AMQPChannelError:
                    raise  # the broker has said no
                except CONNECTION_EXCEPTIONS as error:
                    last = error
                    if (bad := bad_certificate(error)) is not None:
                        raise BrokersError(
                            f"RabbitMQ at {without_password(url)} cannot be trusted: {bad}; see WISP_TLS_CA_FILE"
                        ) from error
                    await asyncio.sleep(RECONNECT_INTERVAL_S)

        try:
            return await asyncio.wait_for(attempt(), CONNECT_TIMEOUT_S)
        except TimeoutError:
            raise BrokersError(
                f"RabbitMQ cannot be used at {without_password(url)} ({last or type(last).__name__}); "
                "start it, or set WISP_AMQP_URL"
            ) from last

    @classmethod
    async def _open(
        cls, connection: AbstractRobustConnection, topology: Topology, journal: JournalLimits | None
    ) -> Broker:
        fast = await connection.channel(publisher_confirms=False)
        sure = await connection.channel(publisher_confirms=True, on_return_raises=True)
        topic, fanout = aio_pika.ExchangeType.TOPIC, aio_pika.ExchangeType.FANOUT
        device = topology.device
        outgoing, kind = (topology.rounds_exchange(device), fanout) if device else (topology.exchange, topic)
        given = bool(device) or not await _may(
            connection, lambda channel: channel.exchange_declare(topology.exchange, exchange_type="topic", durable=True)
        )
        letters = None
        try:
            exchanges = (
                await fast.declare_exchange(outgoing, kind, durable=True, passive=given),
                await sure.declare_exchange(outgoing, kind, durable=True, passive=given),
            )
            if not device:
                letters = await fast.declare_exchange(topology.dead, fanout, durable=True, passive=given)
            if letters is not None and not given:
                dead = topology.dead_queue()
                await (await fast.declare_queue(dead.name, durable=True, arguments=dead.arguments)).bind(letters)
        except ChannelNotFoundEntity as error:
            await connection.close()
            raise _lacking(error) from error
        broker = cls(connection, topology, fast, exchanges, letters, given)
        if journal is not None:
            await broker._record(topology.journal_queue(journal))
        return broker

    async def _record(self, queue: Queue) -> None:
        """Declare the journal, its exchange and their bindings, now and after each reconnect."""
        try:
            self._journal = await self._fast.declare_exchange(
                queue.name, aio_pika.ExchangeType.TOPIC, durable=True, passive=self._given
            )
        except ChannelNotFoundEntity as error:
            await self._connection.close()
            raise _lacking(error) from error
        if self._given:
            return

        async def declare(*_: object) -> None:
            # On a channel that aio-pika does not restore: if somebody has changed the journal meanwhile, the refusal
            # must not keep this process from coming back.
            channel = await self._connection.channel(publisher_confirms=False)
            try:
                plain = await channel.get_underlay_channel()
                await plain.queue_declare(queue.name, durable=True, arguments=queue.arguments)
                for exchange, key in [(self.topology.exchange, key) for key in queue.bindings] + [(queue.name, "#")]:
                    await plain.queue_bind(queue.name, exchange, key)
            except ChannelPreconditionFailed as error:
                self._log.warning(
                    "the journal keeps its old limits; for new ones delete it (wisp journal delete)", error=str(error)
                )
            except CONNECTION_EXCEPTIONS as error:
                self._log.warning("the journal could not be declared", error=repr(error))
            finally:
                with suppress(*CONNECTION_EXCEPTIONS):
                    await channel.close()

        await declare()
        self._connection.reconnect_callbacks.add(declare)

    async def publish(
        self, message: Message, key: str, *, cc: tuple[str, ...] = (), persistent: bool = False, confirmed: bool = False
    ) -> None:
        """Publish once; the broker gives a copy to every queue bound to `key` or to a key in `cc`.

        A transient message that cannot be sent now is dropped with a warning. A confirmed one (every persistent one is)
        raises Unroutable when no queue takes it, and BrokersError when the broker does not say that it has it.
        """
        confirmed = confirmed or persistent
        headers: dict[str, Any] = {SENT_HEADER: time.time_ns() // 1000}
        if cc:
            headers["CC"] = list(cc)
        envelope = aio_pika.Message(
            encode(message),
            headers=headers,
            content_type="application/msgpack",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT if persistent else aio_pika.DeliveryMode.NOT_PERSISTENT,
        )
        exchange = self._sure_exchange if confirmed else self._fast_exchange
        if confirmed and self._journal is not None:
            with suppress(*CONNECTION_EXCEPTIONS):
                await self._journal.publish(envelope, key, mandatory=False)
        try:
            await exchange.publish(envelope, key, mandatory=confirmed, timeout=PUBLISH_TIMEOUT_S)
        except PublishError as error:
            raise Unroutable(f"no queue takes {key!r}: its receiver is not running") from error
        except CONNECTION_EXCEPTIONS as error:
            if confirmed:
                raise BrokersError(f"RabbitMQ did not take a {message.type_name} message: {error!r}") from error
            self._log.warning("message dropped: no connection", key=key, error=repr(error))

    async def consume(
        self, queue: Queue, handler: Handler, *, prefetch: int = 0, stranger: Stranger | None = None
    ) -> Callable[[], Awaitable[None]]:
        """Declare `queue` and call `handler` with each of its messages, from now on, also after reconnects.

        With `prefetch`, messages are acknowledged when their handler returns, at most `prefetch` at a time; without,
        they count as done when they arrive. What cannot be decoded, and what makes its handler fail, is dead-lettered
        with the reason and the original headers. A `stranger`'s is not: it is told, and forgotten.

        Returns what ends it.
        """

        async def receive(incoming: AbstractIncomingMessage) -> None:
            # By its key, which the broker checks: what comes with this one is never handled as a message.
            if incoming.routing_key == probe_key(queue.name):
                probe = str(incoming.headers.get(PROBE_HEADER))
                if (waiting := self._probes.pop(probe, None)) and not waiting.done():
                    waiting.set_result(None)
            else:
                await self._handle(incoming, handler, stranger)
            if prefetch:
                with suppress(*CONNECTION_EXCEPTIONS):  # the broker delivers it again after the reconnect
                    await incoming.ack()

        last: Exception | None = None
        for attempt in range(CONSUME_RETRIES):
            try:
                declared, tag = await self._consume(queue, receive, prefetch)
                break
            except AMQPChannelError:
                raise  # the broker has said no
            except CONNECTION_EXCEPTIONS as error:
                self._log.warning("not consuming yet", queue=queue.name, attempt=attempt, error=repr(error))
                last = error
                await asyncio.sleep(RECONNECT_INTERVAL_S)
        else:
            raise BrokersError(f"queue {queue.name} cannot be consumed: {last!r}") from last
        consumed = (queue, declared, tag)
        self._queues[queue.name] = declared
        self._consumed.append(consumed)

        async def end() -> None:
            self._consumed.remove(consumed)
            await declared.cancel(tag)
            await declared.channel.close()

        return end

    async def _consume(
        self, queue: Queue, receive: Callable[[AbstractIncomingMessage], Awaitable[None]], prefetch: int
    ) -> tuple[AbstractQueue, str]:
        """The queue, consumed, and the consumer's tag."""
        declared, given = await self._declare(queue, prefetch)
        try:
            for key in () if given else queue.bindings:
                await declared.bind(self.topology.exchange, key)
            return declared, await declared.consume(receive, no_ack=not prefetch)
        except BaseException:
            with suppress(*CONNECTION_EXCEPTIONS):
                await declared.channel.close()
            raise

    async def bind(self, queue: Queue, key: str) -> None:
        """Let a queue that is consumed here get what goes to `key` as well, also after reconnects.

        Raises BrokersError.
        """
        try:
            await self._queues[queue.name].bind(self.topology.exchange, key, timeout=PUBLISH_TIMEOUT_S)
        except CONNECTION_EXCEPTIONS as error:
            raise BrokersError(f"RabbitMQ did not bind queue {queue.name} to {key!r}: {error!r}") from error

    async def unbind(self, queue: Queue, key: str) -> None:
        """Undo `bind`. Raises BrokersError."""
        try:
            await self._queues[queue.name].unbind(self.topology.exchange, key, timeout=PUBLISH_TIMEOUT_S)
        except CONNECTION_EXCEPTIONS as error:
            raise BrokersError(f"RabbitMQ did not unbind queue {queue.name} from {key!r}: {error!r}") from error

    async def _declare(self, queue: Queue, prefetch: int) -> tuple[AbstractQueue, bool]:
        """The queue, and whether it was given: declared and bound by those who gave this user its permissions."""
        given = not queue.exclusive and (
            bool(self.topology.device)
            or not await _may(
                self._connection,
                lambda channel: channel.queue_declare(queue.name, durable=queue.durable, arguments=queue.arguments),
            )
        )
        for attempt in range(OWN_QUEUE_RETRIES):
            channel = await self._connection.channel(publisher_confirms=False)
            if prefetch:
                await channel.set_qos(prefetch_count=prefetch)
            try:
                declared = await channel.declare_queue(
                    queue.name,
                    durable=queue.durable,
                    exclusive=queue.exclusive,
                    arguments=queue.arguments,
                    passive=given,
                )
                return declared, given
            except ChannelNotFoundEntity as error:
                with suppress(*CONNECTION_EXCEPTIONS):
                    await channel.close()
                raise _lacking(error) from error
            except ChannelLockedResource:
                # A predecessor of the same name was killed, and the broker has not noticed yet.
                self._log.warning("own queue still held by a predecessor", queue=queue.name, attempt=attempt)
                await asyncio.sleep(0.5)
        raise BrokersError(
            f"queue {queue.name} belongs to another running process; give this one another name with WISP_INSTANCE"
        )

    async def _handle(self, incoming: AbstractIncomingMessage, handler: Handler, stranger: Stranger | None) -> None:
        try:
            if stranger is not None and len(incoming.body) > stranger.longest:
                raise MessageError(f"{len(incoming.body)} bytes, and {stranger.longest} are the most")
            message = decode(incoming.body)
        except MessageError as error:
            if stranger is not None:
                await stranger.refused(str(error))
            else:
                await self._bury(incoming, str(error))
            return
        session = getattr(message, "session", None)
        with structlog.contextvars.bound_contextvars(**({"session": session} if session else {})):
            try:
                await handler(message)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._log.exception("message failed", type=message.type_name)
                await self._bury(incoming, f"{message.type_name}: handler failed: {error!r}")

    async def _bury(self, incoming: AbstractIncomingMessage, reason: str) -> None:
        """Keep a message that cannot be handled, with the reason, where an operator finds it."""
        self._log.warning("message dead-lettered", reason=reason, key=incoming.routing_key)
        headers = {key: value for key, value in incoming.headers.items() if key not in ("CC", "BCC")}
        headers |= {
            "x-wisp-reason": reason[:1000],
            "x-wisp-routing-key": incoming.routing_key or "",
            "x-wisp-exchange": incoming.exchange or "",
        }
        if self._dead_exchange is None:
            return
        copy = aio_pika.Message(incoming.body, headers=headers, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        try:
            await self._dead_exchange.publish(copy, "")
        except CONNECTION_EXCEPTIONS as error:
            self._log.error("dead letter lost: no connection", reason=reason, error=repr(error))

    async def prove(self, queue: Queue, timeout_s: float = 5.0) -> None:
        """Show that `queue`'s consumer in this process is alive, by a round trip through the broker.

        Raises BrokersError when the probe does not come back in time.
        """
        probe = uuid4().hex
        self._probes[probe] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self._fast_exchange.publish(
                    aio_pika.Message(b"", headers={PROBE_HEADER: probe}), probe_key(queue.name)
                )
                await self._probes[probe]
        except CONNECTION_EXCEPTIONS as error:  # a probe that is late among them
            raise BrokersError(f"the consumer of queue {queue.name} does not answer: {error!r}") from error
        finally:
            self._probes.pop(probe, None)

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; while there is none, a new one is being made."""
        return self._connection.connected.is_set()

    async def takes_messages(self) -> bool:
        """Whether RabbitMQ takes messages from this connection: with a memory or disk alarm it stops reading them."""
        transport = self._connection.transport
        if not self.connected or transport is None:
            return False
        try:
            async with asyncio.timeout(0.1):
                await transport.connection.ready()
        except TimeoutError:
            return False
        return True

    async def prove_consumers(self, timeout_s: float = 5.0) -> None:
        """Show that all of this process's consumers are alive.

        An own queue proves it by a round trip. A message for a shared queue might go to another process; there the
        broker must still know our consumer, which it takes away when the queue is deleted, for example. Raises
        BrokersError, with the first that is not alive.
        """
        if not self.connected:
            raise BrokersError("no connection to RabbitMQ")
        for queue, declared, tag in tuple(self._consumed):
            # A device may write to no queue of its own, and so cannot prove that it is reached.
            if queue.exclusive and not self.topology.device:
                try:
                    await self.prove(queue, timeout_s)
                except BrokersError as error:
                    if self.connected and not await self.takes_messages():
                        raise BrokersError(
                            "RabbitMQ takes no messages now; see its alarms of memory and disk"
                        ) from error
                    raise
            else:
                try:
                    async with asyncio.timeout(timeout_s):
                        channel = await declared.channel.get_underlay_channel()
                except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
                    raise BrokersError(f"the channel of queue {queue.name} is not open: {error!r}") from error
                assert isinstance(channel, aiormq.Channel)
                if tag not in channel.consumers:
                    raise BrokersError(f"RabbitMQ has cancelled the consumer of queue {queue.name}")

    async def close(self) -> None:
        """Close the connection; unacknowledged messages go to others."""
        await self._connection.close()


async def _may(connection: AbstractRobustConnection, declare: Callable[[PlainChannel], Awaitable[object]]) -> bool:
    """Whether this user may declare it. A user with least privilege may not: it uses what is there."""
    assert connection.transport is not None
    # A channel of its own, which the refusal closes, and which is not opened again after a reconnect.
    channel = await connection.transport.connection.channel()
    try:
        await declare(channel)
    except ChannelAccessRefused:
        return False
    await channel.close()
    return True


def _lacking(error: ChannelNotFoundEntity) -> BrokersError:
    return BrokersError(
        f"RabbitMQ lacks what this user may not declare itself ({error}); import what `wisp broker definitions` prints"
    )


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
