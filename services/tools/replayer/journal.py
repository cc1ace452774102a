"""The journal at the broker: read, filled from a file, deleted."""

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

from services.tools.replayer.core.recording import Packed, Recording, RecordingError, Source
from shared.broker.client import SENT_HEADER, without_password
from shared.broker.topology import JournalLimits, Topology
from shared.errors import BrokersError
from shared.runtime.settings import TlsSettings

REDACTED_HEADER = "x-wisp-redacted"
CONNECT_S = 10.0
FIRST_S = 3.0
QUIET_S = 0.3
"""The last messages of a journal have all come when none has come for this long."""
LAST_S = 1.0
"""They have all come after this long, whatever a suite that is running goes on sending."""
STALLED_S = 30.0
PREFETCH = 1000
ACKNOWLEDGE_EVERY = 250
PUBLISH_AT_ONCE = 500


@asynccontextmanager
async def connected(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    """A connection that is not restored. Raises BrokersError."""
    try:
        async with asyncio.timeout(CONNECT_S):
            context = TlsSettings().tls.context() if amqp_url.startswith("amqps:") else None
            connection = await aio_pika.connect(amqp_url, ssl_context=context)
    except InvalidFrameError as error:
        # All that aiormq says when the broker refuses to open the virtual host.
        vhost = vhost_of(amqp_url)
        raise BrokersError(
            f"there is no virtual host {vhost!r} at {without_password(amqp_url)}, or its user may not use it; type: "
            f"rabbitmqctl add_vhost {vhost}, and rabbitmqctl set_permissions for the user"
        ) from error
    except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
        raise BrokersError(
            f"RabbitMQ cannot be used at {without_password(amqp_url)} ({error or type(error).__name__}); say where it "
            "is: --amqp-url, or WISP_AMQP_URL"
        ) from error
    async with connection:
        yield connection


def vhost_of(amqp_url: str) -> str:
    """The virtual host that a broker's address names."""
    return unquote(urlsplit(amqp_url).path[1:]) or "/"


def source_of(connection: AbstractConnection, amqp_url: str, namespace: str) -> Source:
    """Where a connection leads."""
    parts = urlsplit(amqp_url)
    properties: Any = getattr(getattr(connection.transport, "connection", None), "server_properties", None) or {}
    return Source(
        namespace, vhost_of(amqp_url), f"{parts.hostname}:{parts.port or 5672}", str(properties.get("cluster_name", ""))
    )


async def read(amqp_url: str, namespace: str, since_ms: float | None = None) -> Recording:
    """Everything that the journal holds now, or what was sent since a time (milliseconds since 1970) and a little more.

    Raises BrokersError; RecordingError where there is no journal.
    """
    async with connected(amqp_url) as connection:
        source = source_of(connection, amqp_url, namespace)
        queue = Topology(namespace).journal
        try:
            async with asyncio.timeout(CONNECT_S):
                count = await _count(connection, queue)
        except ChannelNotFoundEntity as error:
            raise _missing(source) from error
        recording = Recording(source)
        last = await _last_offset(connection, queue, FIRST_S if count else QUIET_S)
        if last is None:
            return recording
        since = None if since_ms is None else datetime.fromtimestamp(max(0.0, since_ms / 1000), UTC)
        await _read_to(connection, queue, since, last, recording)
        return recording.within(since_ms, None)


def _missing(source: Source) -> RecordingError:
    return RecordingError(
        f"there is no journal in namespace {source.namespace} (vhost {source.vhost}) at {source.address}: recording is "
        "off. Start the services with WISP_JOURNAL=true, or name a recorded file with --file"
    )


async def _count(connection: AbstractConnection, queue: str) -> int:
    channel = await connection.channel()
    declared = await channel.declare_queue(queue, passive=True)
    count = declared.declaration_result.message_count or 0
    await channel.close()
    return count


async def _last_offset(connection: AbstractConnection, queue: str, first_s: float) -> int | None:
    """The offset of the last message that is there now; None if there is none."""
    found: asyncio.Queue[int] = asyncio.Queue()

    async def see(message: AbstractIncomingMessage) -> None:
        found.put_nowait(_offset(message))

    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    stream = await channel.get_queue(queue, ensure=False)
    # Not acknowledged: what is wanted is one chunk, of at most some thousand messages.
    await stream.consume(see, arguments={"x-stream-offset": "last"})
    last = None
    with suppress(TimeoutError):
        last = await asyncio.wait_for(found.get(), first_s)
        async with asyncio.timeout(LAST_S):
            while True:
                last = max(last, await asyncio.wait_for(found.get(), QUIET_S))
    await channel.close()
    return last


async def _read_to(
    connection: AbstractConnection, queue: str, since: datetime | None, last: int, recording: Recording
) -> None:
    done = asyncio.Event()
    news = asyncio.Event()

    async def take(message: AbstractIncomingMessage) -> None:
        offset = _offset(message)
        if offset <= last and not done.is_set():
            headers = message.headers
            at_us = headers.get(SENT_HEADER)
            recording.redacted = recording.redacted or bool(headers.get(REDACTED_HEADER))
            recording.packed.append(
                Packed(at_us if isinstance(at_us, int) else None, message.routing_key or "", message.body)
            )
        if offset >= last:
            done.set()
        news.set()
        if offset % ACKNOWLEDGE_EVERY == 0:
            await message.ack(multiple=True)

    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    stream = await channel.get_queue(queue, ensure=False)
    await stream.consume(take, arguments={"x-stream-offset": since or "first"})
    # From a time after the last message on, the broker waits for a next one, which need not come.
    patience_s = FIRST_S if since else STALLED_S
    finished = asyncio.ensure_future(done.wait())
    try:
        while not finished.done():
            news.clear()
            waiting = asyncio.ensure_future(news.wait())
            await asyncio.wait({finished, waiting}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if news.is_set():
                patience_s = STALLED_S
            elif not finished.done():
                if since and not recording.packed:
                    break
                raise BrokersError(f"the journal {queue} stopped telling after {len(recording.packed)} messages")
    finally:
        finished.cancel()
    await channel.close()


def _offset(message: AbstractIncomingMessage) -> int:
    offset = message.headers.get("x-stream-offset")
    return offset if isinstance(offset, int) else -1


async def fill(amqp_url: str, namespace: str, recording: Recording, limits: JournalLimits) -> None:
    """Make a journal of this namespace that holds a recording, for `wisp replay` to read. Nothing else is declared.

    Raises BrokersError; RecordingError where the namespace has a journal already.
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
        for one in recording.packed:
            headers: dict[str, Any] = {}
            if one.at_us is not None:
                headers[SENT_HEADER] = one.at_us
            if recording.redacted:
                headers[REDACTED_HEADER] = True
            sending.append(exchange.publish(aio_pika.Message(one.body, headers=headers), one.key))
            if len(sending) == PUBLISH_AT_ONCE:
                await asyncio.gather(*sending)
                sending.clear()
        await asyncio.gather(*sending)


async def delete(amqp_url: str, namespace: str) -> bool:
    """Delete the journal and all that it holds; False if there was none. Raises BrokersError."""
    async with connected(amqp_url) as connection:
        queue = Topology(namespace).journal
        try:
            await _count(connection, queue)
        except ChannelNotFoundEntity:
            return False
        await (await connection.channel()).queue_delete(queue)
        return True
