"""The journal, a stream queue at RabbitMQ: read it, import a recording into a new one, delete it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq.exceptions import ChannelNotFoundEntity, InvalidFrameError

from services.tools.replayer.core.recording import PackedMessage, Recording, RecordingError, RecordingSource
from shared.broker.client import SENT_HEADER
from shared.broker.connection import addresses, connect_once, without_password
from shared.broker.topology import JournalLimits, Topology
from shared.errors import BrokersError
from shared.messages import ungroup
from shared.runtime.settings import TlsSettings

REDACTED_HEADER = "x-wisp-redacted"
CONNECT_S = 10.0
FIRST_S = 3.0
"""Longest wait for a first message."""
QUIET_S = 0.3
"""Without a message for this long, the end of the journal is reached."""
LAST_S = 1.0
"""Time limit of the search for the end, while a running suite goes on recording."""
STALLED_S = 30.0
"""Without a message for this long before the end, the read fails."""
PREFETCH = 1000
ACKNOWLEDGE_EVERY = 250
PUBLISH_AT_ONCE = 500


@asynccontextmanager
async def connected(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    """Open a connection that does not reconnect. Raises BrokersError."""
    try:
        async with asyncio.timeout(CONNECT_S):
            context = TlsSettings().tls.context() if "amqps:" in amqp_url else None
            connection = await connect_once(amqp_url, context)
    except InvalidFrameError as error:
        # The only error of aiormq when the broker refuses to open the virtual host.
        vhost = vhost_of(amqp_url)
        raise BrokersError(
            f"there is no virtual host {vhost!r} at {without_password(amqp_url)}, or its user may not use it; type: "
            f"rabbitmqctl add_vhost {vhost}, and rabbitmqctl set_permissions for the user"
        ) from error
    except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
        raise BrokersError(
            f"RabbitMQ cannot be used at {without_password(amqp_url)} ({error or type(error).__name__}); give its "
            "address: --amqp-url, or WISP_AMQP_URL"
        ) from error
    async with connection:
        yield connection


def vhost_of(amqp_url: str) -> str:
    """Return the virtual host in a broker's URL, or in the first of several."""
    return unquote(urlsplit(addresses(amqp_url)[0]).path[1:]) or "/"


def source_of(connection: AbstractConnection, amqp_url: str, namespace: str) -> RecordingSource:
    """Return the broker of a connection as the source of a recording."""
    parts = urlsplit(addresses(amqp_url)[0])
    properties: Any = getattr(getattr(connection.transport, "connection", None), "server_properties", None) or {}
    return RecordingSource(
        namespace, vhost_of(amqp_url), f"{parts.hostname}:{parts.port or 5672}", str(properties.get("cluster_name", ""))
    )


async def read(amqp_url: str, namespace: str, since_ms: float | None = None) -> Recording:
    """Read the journal up to its current end. since_ms: only messages sent from then on, in milliseconds since 1970.

    Raises BrokersError; RecordingError if there is no journal.
    """
    async with connected(amqp_url) as connection:
        source = source_of(connection, amqp_url, namespace)
        queue = Topology(namespace).journal
        try:
            async with asyncio.timeout(CONNECT_S):
                count = await _count(connection, queue)
        except ChannelNotFoundEntity as error:
            raise RecordingError(
                f"there is no journal in namespace {namespace} (vhost {source.vhost}) at {source.address}: recording "
                "is off. Start the services with WISP_JOURNAL=true, or name a recorded file with --file"
            ) from error
        recording = Recording(source)
        last = await _last_offset(connection, queue, FIRST_S if count else QUIET_S)
        if last is None:
            return recording
        since = None if since_ms is None else datetime.fromtimestamp(max(0.0, since_ms / 1000), UTC)
        await _Reading(recording, since, last).run(connection, queue)
        return recording.within(since_ms, None)


async def _count(connection: AbstractConnection, queue: str) -> int:
    """Return the number of messages in a queue. Raises ChannelNotFoundEntity if there is no such queue."""
    channel = await connection.channel()
    declared = await channel.declare_queue(queue, passive=True)
    count = declared.declaration_result.message_count or 0
    await channel.close()
    return count


async def _last_offset(connection: AbstractConnection, queue: str, first_s: float) -> int | None:
    """Return the offset of the journal's current last message; None if it is empty."""
    offsets: asyncio.Queue[int] = asyncio.Queue()

    async def note(message: AbstractIncomingMessage) -> None:
        offsets.put_nowait(_offset(message))

    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    stream = await channel.get_queue(queue, ensure=False)
    # "last" is the last chunk, of at most some thousand messages; without acknowledgements not much more comes.
    await stream.consume(note, arguments={"x-stream-offset": "last"})
    last = None
    with suppress(TimeoutError):
        last = await asyncio.wait_for(offsets.get(), first_s)
        async with asyncio.timeout(LAST_S):
            while True:
                last = max(last, await asyncio.wait_for(offsets.get(), QUIET_S))
    await channel.close()
    return last


class _Reading:
    """One read of the journal, from a time or the beginning to the offset `last`."""

    def __init__(self, recording: Recording, since: datetime | None, last: int) -> None:
        self._recording = recording
        self._since = since
        self._last = last
        self._done = asyncio.Event()
        self._received = asyncio.Event()

    async def run(self, connection: AbstractConnection, queue: str) -> None:
        """Read. Raises BrokersError if the broker stops sending before the end."""
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        stream = await channel.get_queue(queue, ensure=False)
        await stream.consume(self._receive, arguments={"x-stream-offset": self._since or "first"})
        done = asyncio.ensure_future(self._done.wait())
        try:
            await self._wait(done, queue)
        finally:
            done.cancel()
        await channel.close()

    async def _wait(self, done: asyncio.Future[Any], queue: str) -> None:
        # If the start time is later than all messages, the broker sends nothing until a new message comes.
        patience_s = FIRST_S if self._since else STALLED_S
        while not done.done():
            self._received.clear()
            received = asyncio.ensure_future(self._received.wait())
            await asyncio.wait({done, received}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            received.cancel()
            if self._received.is_set():
                patience_s = STALLED_S
            elif not done.done():
                count = len(self._recording.packed)
                if self._since and not count:
                    return
                raise BrokersError(f"the broker stopped sending the journal {queue} after {count} messages")

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        offset = _offset(message)
        if offset <= self._last and not self._done.is_set():
            headers = message.headers
            at_us = headers.get(SENT_HEADER)
            self._recording.redacted = self._recording.redacted or bool(headers.get(REDACTED_HEADER))
            self._recording.packed += [
                PackedMessage(at_us if isinstance(at_us, int) else None, message.routing_key or "", body)
                for body in ungroup(message.body)
            ]
        if offset >= self._last:
            self._done.set()
        self._received.set()
        if offset % ACKNOWLEDGE_EVERY == 0:
            await message.ack(multiple=True)


def _offset(message: AbstractIncomingMessage) -> int:
    offset = message.headers.get("x-stream-offset")
    return offset if isinstance(offset, int) else -1


async def fill(amqp_url: str, namespace: str, recording: Recording, limits: JournalLimits) -> None:
    """Create this namespace's journal and publish a recording into it. Declares nothing else.

    Raises BrokersError; RecordingError if the namespace has a journal already.
    """
    topology = Topology(namespace)
    queue = topology.journal_queue(limits)
    async with connected(amqp_url) as connection:
        source = source_of(connection, amqp_url, namespace)
        try:
            await _count(connection, queue.name)
        except ChannelNotFoundEntity:
            pass
        else:
            raise RecordingError(
                f"namespace {namespace} (vhost {source.vhost}) at {source.address} has a journal already: import into "
                "another one (--namespace)"
            )
        channel = await connection.channel()
        exchange = await channel.declare_exchange(topology.journal, aio_pika.ExchangeType.TOPIC, durable=True)
        stream = await channel.declare_queue(queue.name, durable=True, arguments=queue.arguments)
        await stream.bind(exchange, "#")
        sending: list[Any] = []
        for packed in recording.packed:
            headers: dict[str, Any] = {}
            if packed.at_us is not None:
                headers[SENT_HEADER] = packed.at_us
            if recording.redacted:
                headers[REDACTED_HEADER] = True
            sending.append(exchange.publish(aio_pika.Message(packed.body, headers=headers), packed.key))
            if len(sending) == PUBLISH_AT_ONCE:
                await asyncio.gather(*sending)
                sending.clear()
        await asyncio.gather(*sending)


async def delete(amqp_url: str, namespace: str) -> bool:
    """Delete the journal and all its messages; return False if there was none. Raises BrokersError."""
    async with connected(amqp_url) as connection:
        queue = Topology(namespace).journal
        try:
            await _count(connection, queue)
        except ChannelNotFoundEntity:
            return False
        await (await connection.channel()).queue_delete(queue)
        return True
