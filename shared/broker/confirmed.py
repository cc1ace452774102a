"""Publishing with confirmations: the exchange for messages that RabbitMQ must store before the sender goes on."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractRobustConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError, PublishError

from shared.broker.connection import losses_as_errors

OPEN_S = 2.0
"""Longest time to open or close a channel: during an alarm RabbitMQ reads nothing."""


@dataclass(eq=False)
class _Confirming:
    """An exchange on a channel with publisher confirms."""

    channel: AbstractChannel
    exchange: AbstractExchange
    pending: int = 0
    """Messages that wait for their confirmation."""
    confirmed_s: dict[str, float] = field(default_factory=dict)
    """When the last message was confirmed, by routing key and the event loop's clock."""

    @classmethod
    async def open(cls, connection: AbstractRobustConnection, name: str) -> _Confirming:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        return cls(channel, await channel.get_exchange(name, ensure=False))


class ConfirmedExchange:
    """An exchange whose messages RabbitMQ confirms. A new channel replaces one whose message RabbitMQ refused, or did
    not confirm in time.

    A channel opened while a quorum queue elects a leader may be refused, or ignored, for as long as the old leader's
    node is down (seen with RabbitMQ 3.10); a new channel is not.
    """

    def __init__(self, connection: AbstractRobustConnection, confirming: _Confirming) -> None:
        self._connection = connection
        self._current = confirming
        self._closings: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, connection: AbstractRobustConnection, name: str) -> ConfirmedExchange:
        """Open a channel for an exchange that exists."""
        return cls(connection, await _Confirming.open(connection, name))

    async def publish(self, envelope: Message, key: str, timeout_s: float, silence_s: float | None = None) -> None:
        """Publish, and wait for the confirmation.

        silence_s: longest time in which RabbitMQ confirms no message with this key; None for `timeout_s`. While it
        confirms others it is only busy, and a repeated message would make it busier.

        Raises PublishError when no queue is bound to the key, and one of aio-pika's CONNECTION_EXCEPTIONS when
        RabbitMQ refuses the message or does not confirm it in time, or the connection is lost.
        """
        used = self._current
        used.pending += 1
        try:
            await _confirmed(used, envelope, key, timeout_s, timeout_s if silence_s is None else silence_s)
        except PublishError:
            raise
        except (DeliveryError, TimeoutError):
            await self._replace(used)
            raise
        finally:
            used.pending -= 1
            # The end of a channel cancels those who wait on it: the last of them closes it.
            if used is not self._current and not used.pending:
                self._close(used)

    async def _replace(self, refused: _Confirming) -> None:
        if self._current is not refused or not self._connection.connected.is_set():
            return
        with suppress(*CONNECTION_EXCEPTIONS):
            async with asyncio.timeout(OPEN_S):
                renewed = await _Confirming.open(self._connection, refused.exchange.name)
            if self._current is refused:
                self._current = renewed
            else:  # another refused message was faster
                self._close(renewed)

    def _close(self, confirming: _Confirming) -> None:
        """Close a channel in the background: a channel that waits for a dead node answers late, or never."""
        closing = asyncio.create_task(_close(confirming))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)


async def _confirmed(used: _Confirming, envelope: Message, key: str, timeout_s: float, silence_s: float) -> None:
    """Publish and wait for the confirmation. Raises TimeoutError, and the errors of `ConfirmedExchange.publish`."""
    now_s = asyncio.get_running_loop().time
    begun_s = now_s()
    publishing = asyncio.create_task(used.exchange.publish(envelope, key, mandatory=True))
    try:
        while not publishing.done():
            silent_since_s = max(begun_s, used.confirmed_s.get(key, begun_s))
            left_s = min(begun_s + timeout_s, silent_since_s + silence_s) - now_s()
            if left_s <= 0:
                raise TimeoutError
            await asyncio.wait({publishing}, timeout=left_s)
    finally:
        publishing.cancel()
    with losses_as_errors():
        publishing.result()
    used.confirmed_s[key] = now_s()


async def _close(confirming: _Confirming) -> None:
    with suppress(*CONNECTION_EXCEPTIONS):
        async with asyncio.timeout(OPEN_S):
            await confirming.channel.close()
