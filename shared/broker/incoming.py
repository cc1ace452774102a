"""Incoming messages: decoded, handed to a handler, and dead-lettered or refused where that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aio_pika
import structlog
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from shared.broker import metrics
from shared.broker.connection import in_words, losses_as_errors
from shared.errors import MessageError
from shared.messages import Message, decode_group
from shared.runtime import logging, tracing

Handler = Callable[[Message], Awaitable[None]]


class GiveBack(Exception):
    """Raised by a handler to return its message to the queue, from which RabbitMQ delivers it again."""


@dataclass(frozen=True)
class UntrustedSender:
    """The sender of a queue's messages, whose bad messages are refused instead of dead-lettered."""

    max_bytes: int
    """Longest accepted message."""
    refused: Callable[[str], Awaitable[None]]
    """Called with the reason for each refused message."""


class IncomingMessages:
    """Hands the messages of a connection to their handlers."""

    def __init__(self, dead_letters: AbstractExchange | None) -> None:
        """dead_letters: None where bad messages are dropped."""
        self._dead_letters = dead_letters
        self._log = logging.get()

    async def handle(self, incoming: AbstractIncomingMessage, handler: Handler, sender: UntrustedSender | None) -> None:
        """Call a handler with the messages of an envelope. Raises GiveBack if the handler does."""
        try:
            if sender is not None and len(incoming.body) > sender.max_bytes:
                raise MessageError(f"{len(incoming.body)} bytes; at most {sender.max_bytes} are accepted")
            messages = decode_group(incoming.body)
        except MessageError as error:
            if sender is not None:
                await sender.refused(str(error))
            else:
                await self._dead_letter(incoming, str(error))
            return
        metrics.RECEIVED.labels(messages[0].type_name).inc()
        if tracing.is_on() and tracing.names_span(incoming.headers):
            with tracing.received(incoming.headers):
                await self._handle_messages(messages, incoming, handler)
        else:
            await self._handle_messages(messages, incoming, handler)

    async def _handle_messages(
        self, messages: Sequence[Message], incoming: AbstractIncomingMessage, handler: Handler
    ) -> None:
        for message in messages:
            await self._handle_message(message, incoming, handler)

    async def _handle_message(self, message: Message, incoming: AbstractIncomingMessage, handler: Handler) -> None:
        session = getattr(message, "session", None)
        with structlog.contextvars.bound_contextvars(**({"session": session} if session else {})):
            try:
                await handler(message)
            except (asyncio.CancelledError, GiveBack):
                raise
            except Exception as error:
                self._log.exception("message failed", type=message.type_name)
                await self._dead_letter(incoming, f"{message.type_name}: handler failed: {error!r}")

    async def _dead_letter(self, incoming: AbstractIncomingMessage, reason: str) -> None:
        """Send a message that cannot be handled to the dead letters, with the reason."""
        self._log.warning("message dead-lettered", reason=reason, key=incoming.routing_key)
        headers = {key: value for key, value in incoming.headers.items() if key not in ("CC", "BCC")}
        headers |= {
            "x-wisp-reason": reason[:1000],
            "x-wisp-routing-key": incoming.routing_key or "",
            "x-wisp-exchange": incoming.exchange or "",
        }
        if self._dead_letters is None:
            return
        copy = aio_pika.Message(incoming.body, headers=headers, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        try:
            with losses_as_errors():
                await self._dead_letters.publish(copy, "")
        except CONNECTION_EXCEPTIONS as error:
            self._log.error("dead letter lost: no connection", reason=reason, error=in_words(error))
