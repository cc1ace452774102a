"""Connections to RabbitMQ at one of several addresses, and what their errors mean.

`WISP_AMQP_URL` holds one URL, or several separated by commas: the nodes of a cluster. They are tried in turn, at the
start and after each lost connection.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from ssl import SSLContext
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit
from uuid import uuid4

import aio_pika
import aiormq
from aio_pika import RobustChannel, RobustConnection
from aio_pika.abc import AbstractConnection, AbstractRobustConnection, TimeoutType
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelInvalidStateError, DeliveryError
from aio_pika.robust_queue import RobustQueue
from aiormq.abc import AbstractChannel as PlainChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity
from yarl import URL

from shared.broker.silence import ImpatientTransports
from shared.broker.topology import FRESH

T = TypeVar("T")

ATTEMPT_S = 10.0
"""Longest time until one address has answered and logged the client in."""
ATTEMPT_OF_SEVERAL_S = 4.0
"""The same where other addresses can be tried."""
RECONNECT_INTERVAL_S = 1
ELECTION_S = 2.0
"""Time that a cluster gets after a lost connection to elect the leaders that a dead node held, before channels are
restored. RabbitMQ 3.10 can lose what a channel sends to a quorum queue, and its consumers, until the dead node returns,
if the channel was opened during the election (0.2 to 1.6 s on a test machine)."""
PROBE_S = 1.0
"""Longest wait for a shared queue after a reconnect, before the services' other work goes on."""
HEARTBEAT_S = 10
"""After two missed heartbeats RabbitMQ drops a process and gives its messages to others: a frozen scheduler keeps its
standby waiting for that long. `?heartbeat=` in the URL sets another time."""
HEARTBEAT_OF_SEVERAL_S = 3
"""The same where other addresses can be tried. A silent one is given up after two seconds more."""
LISTEN_RETRY_S = 0.2
"""Time between attempts at the start, when RabbitMQ often starts as well."""


def addresses(urls: str) -> list[str]:
    """Return the URLs in a comma-separated list. A comma within a URL must be written as %2C."""
    return [url for part in urls.split(",") if (url := part.strip())]


def without_password(urls: str) -> str:
    """Return the URLs without users and passwords."""
    shown = []
    for url in addresses(urls):
        scheme, _, rest = url.partition("://")
        shown.append(f"{scheme}://{rest.rpartition('@')[2]}")
    return ",".join(shown)


def in_words(error: BaseException | None) -> str:
    """Describe an error of the connection for people, without the client library's object names."""
    if isinstance(error, DeliveryError):
        return "RabbitMQ could not store the message"
    if isinstance(error, ChannelInvalidStateError):
        return "the connection was lost and is not restored yet"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno is not None:
        # RabbitMQ's own codes begin at 200.
        return os.strerror(error.errno) if error.errno < 200 else str(error.strerror)
    text = " ".join(part for part in getattr(error, "args", ()) if isinstance(part, str))
    if not text or re.search(r"<[^>]*>|\bobject at 0x", text):
        return "the connection was lost"
    return text


@contextmanager
def losses_as_errors() -> Iterator[None]:
    """Raise ConnectionError for the errors of a connection that aiormq has given up by itself.

    After missed heartbeats aiormq cancels its reader, and with it each call that awaits an answer, although nobody has
    cancelled the calling task. If it has no reason to give, it raises a bare Exception.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError("the connection was lost") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ConnectionError("the connection was lost") from error


_ASKED: set[asyncio.Task[Any]] = set()
"""Questions that RabbitMQ has not answered yet."""


class _RestoredQueue(RobustQueue):
    """A queue that is declared again after a reconnect: an exclusive one under a fresh name.

    RabbitMQ may still hold the old one: until it notices that the last connection is dead, and since version 4.2 as
    long as a dead node of the cluster stays away.

    A shared queue whose node does not run does not hold up the others: aio-pika's recovery of consumers asks for it
    again and again, and consumes it when its node is back.
    """

    _declared_on: object = None
    """The transport on which it was declared last."""
    _plain_only = False
    """True if only the plain name is allowed: the definitions come from an earlier version."""
    _asked: asyncio.Task[None] | None = None
    """The declaration of the queue that RabbitMQ may not have answered yet."""

    async def declare(self, timeout: TimeoutType = None) -> aiormq.spec.Queue.DeclareOk:  # noqa: ASYNC109
        """Declare the queue, with a fresh name if the connection is another than before."""
        transport = self._connection.transport
        plain = str(self.name).partition(FRESH)[0]
        if self.exclusive and self._declared_on not in (None, transport):
            self.name = plain if self._plain_only else f"{plain}{FRESH}{uuid4().hex[:8]}"
        try:
            declared = await super().declare(timeout)
        except ChannelAccessRefused:
            self._plain_only = self.name != plain
            raise
        self._declared_on = transport
        return declared

    async def restore(self, channel: Any = None) -> None:
        """Declare, bind and consume the queue after a reconnect; a shared one whose node does not run, later."""
        if not self.exclusive:
            try:
                await self._probe()
            except (TimeoutError, ChannelNotFoundEntity):
                self._connection._request_recovery()
                return
        await super().restore(channel)

    async def _probe(self, channel: aiormq.abc.AbstractChannel | None = None) -> None:
        """Declare and bind the queue on a channel of its own. Raises TimeoutError without an answer in `PROBE_S`.

        The next call waits for the same answer. `channel`, which aio-pika gives and soon closes, is not used: see
        `answer`.
        """
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask())
            self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        await asyncio.wait({self._asked}, timeout=PROBE_S)
        if not self._asked.done():
            raise TimeoutError
        self._asked.result()

    async def _ask(self) -> None:
        async with passing_channel(self._connection) as plain:
            await plain.queue_declare(
                self.name,
                durable=self.durable,
                exclusive=self.exclusive,
                auto_delete=self.auto_delete,
                arguments=self.arguments,
                passive=self.passive,
            )
            for (exchange, key), options in tuple(self._bindings.items()):
                await plain.queue_bind(self.name, str(exchange), key, **options)

    @property
    def _connection(self) -> RobustConnection:
        return cast(RobustConnection, cast(RobustChannel, self.channel)._connection)


async def answer(question: Coroutine[Any, Any, T], within_s: float) -> T:
    """Return RabbitMQ's answer to a question. Raises TimeoutError without one in time.

    The question itself is not given up, even if this is cancelled: RabbitMQ 4.3 refuses what concerns a queue on a node
    that does not run after more than a minute. On a channel that was closed meanwhile the client library does not
    confirm the refusal, and RabbitMQ ends the connection when the channel's number is used again. A question ends with
    its connection.
    """
    asked = asyncio.create_task(question)
    _ASKED.add(asked)
    asked.add_done_callback(_forget)
    await asyncio.wait({asked}, timeout=within_s)
    if not asked.done():
        raise TimeoutError
    return asked.result()


def _forget(asked: asyncio.Task[Any]) -> None:
    _ASKED.discard(asked)
    if not asked.cancelled():
        asked.exception()  # nobody may wait for it any more


@asynccontextmanager
async def passing_channel(connection: AbstractRobustConnection) -> AsyncIterator[PlainChannel]:
    """A channel for one question, which aio-pika does not restore: a refusal closes the channel."""
    if connection.transport is None:
        raise ConnectionError("the connection was lost")
    with losses_as_errors():
        channel = await connection.transport.connection.channel(publisher_confirms=False)
        try:
            yield channel
        finally:
            if not channel.is_closed:
                await channel.close()


class _Channel(RobustChannel):
    QUEUE_CLASS = _RestoredQueue


class SuiteConnection(RobustConnection):
    """A connection that is restored at the next of its addresses."""

    CHANNEL_CLASS = _Channel

    _addresses: list[URL]
    _next = 0
    _lost_at_s = -math.inf

    def end_when_silent(self) -> None:
        """Give up an address that sends nothing for longer than a heartbeat."""
        self.kwargs["transport_factory"] = ImpatientTransports()

    async def _on_connection_close(self, closing: asyncio.Future[Any]) -> None:
        self._lost_at_s = time.monotonic()
        await super()._on_connection_close(closing)

    async def _on_connected(self) -> None:
        """Restore the channels, once a cluster's queues had time to elect their leaders."""
        if len(self._addresses) > 1:
            await asyncio.sleep(self._lost_at_s + ELECTION_S - time.monotonic())
        await super()._on_connected()

    @property
    def url(self) -> URL:
        """The address of the next attempt. aio-pika reads it once for each."""
        url = self._addresses[self._next % len(self._addresses)]
        self._next += 1
        return url

    @url.setter
    def url(self, url: URL) -> None:
        self._addresses = [url]

    def go_on_with(self, others: Sequence[URL]) -> None:
        """Try these addresses, in turn, before the present one again."""
        self._addresses = [*others, self._addresses[0]]
        self._next = 0

    def __str__(self) -> str:
        return without_password(",".join(map(str, self._addresses)))


async def connect_robustly(urls: Sequence[str], name: str, context: SSLContext | None) -> SuiteConnection:
    """Connect to the first of these addresses. After a lost connection try the others in turn, then this one again."""
    several = len(urls) > 1
    first, *others = (_with_heartbeat(url, HEARTBEAT_OF_SEVERAL_S if several else HEARTBEAT_S) for url in urls)
    connection = SuiteConnection(
        first,
        reconnect_interval=RECONNECT_INTERVAL_S,
        client_properties={"connection_name": name},
        ssl_context=context,
    )
    if several:
        connection.end_when_silent()
    try:
        await connection.connect(ATTEMPT_OF_SEVERAL_S if several else ATTEMPT_S)
    except BaseException:
        await connection.close()  # or aio-pika goes on trying
        raise
    connection.go_on_with(others)
    return connection


def _with_heartbeat(url: str, heartbeat_s: int) -> URL:
    address = URL(url)
    return address if "heartbeat" in address.query else address.update_query(heartbeat=heartbeat_s)


async def connect_once(urls: str, context: SSLContext | None = None, **options: Any) -> AbstractConnection:
    """Connect to the first address that answers, without restoring the connection. Raises the last address's error."""
    *others, last = addresses(urls)
    for url in others:
        try:
            return cast(
                AbstractConnection, await aio_pika.connect(url, timeout=ATTEMPT_S, ssl_context=context, **options)
            )
        except CONNECTION_EXCEPTIONS:
            continue
    return cast(AbstractConnection, await aio_pika.connect(last, timeout=ATTEMPT_S, ssl_context=context, **options))


async def until_listening(urls: str, failed: Callable[[OSError], None]) -> None:
    """Wait until something listens at one of the addresses. Unlike an attempt to log in, this logs nothing.

    failed: called with the error of each address at which nothing does.
    """
    while True:
        for url in addresses(urls):
            address = urlsplit(url)
            try:
                _, writer = await asyncio.open_connection(
                    address.hostname, address.port or (5671 if address.scheme == "amqps" else 5672)
                )
            except OSError as error:
                failed(error)
                continue
            writer.close()
            return
        await asyncio.sleep(LISTEN_RETRY_S)
