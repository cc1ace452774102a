"""A broker in memory, for tests without RabbitMQ. It passes `broker_contract`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shared.broker.incoming import GiveBack, Handler
from shared.broker.topology import Queue, Topology
from shared.errors import Unroutable
from shared.messages import Message, decode_group, encode, encode_group


@dataclass(eq=False)
class MemoryConsumer:
    """A handler of a queue's messages."""

    handler: Handler
    prefetch: int
    """Most messages at once; 0 for no limit."""
    busy: int = 0

    @property
    def has_room(self) -> bool:
        return not self.prefetch or self.busy < self.prefetch


@dataclass
class MemoryQueue:
    """Messages that wait for a consumer."""

    bindings: set[str] = field(default_factory=set)
    waiting: deque[bytes] = field(default_factory=deque)
    consumers: deque[MemoryConsumer] = field(default_factory=deque)
    """The next message goes to the first one that has room, which is the last one then."""
    has_one_active: bool = False
    """True if all messages go to the first consumer."""

    def next_consumer(self) -> MemoryConsumer | None:
        """Return the consumer of the next message, if it has room."""
        if self.has_one_active:
            return self.consumers[0] if self.consumers and self.consumers[0].has_room else None
        found = next((one for one in self.consumers if one.has_room), None)
        if found is not None:
            self.consumers.remove(found)
            self.consumers.append(found)
        return found

    def takes(self, keys: Sequence[str]) -> bool:
        """Return whether the queue is bound to one of these keys."""
        return any(_matches(binding, key) for binding in self.bindings for key in keys)


def _matches(binding: str, key: str) -> bool:
    """Return whether a topic's binding takes a key: `*` stands for one word."""
    wanted, words = binding.split("."), key.split(".")
    return len(wanted) == len(words) and all(one in ("*", word) for one, word in zip(wanted, words, strict=True))


class MemoryServer:
    """The queues that several brokers share, as RabbitMQ keeps them."""

    def __init__(self) -> None:
        self.queues: dict[str, MemoryQueue] = {}
        self._handling: set[asyncio.Task[None]] = set()

    def route(self, body: bytes, keys: Sequence[str]) -> bool:
        """Put a message into every queue bound to one of the keys; return whether there is one."""
        found = [queue for queue in self.queues.values() if queue.takes(keys)]
        for queue in found:
            queue.waiting.append(body)
            self.deliver(queue)
        return bool(found)

    def deliver(self, queue: MemoryQueue) -> None:
        """Hand waiting messages to the consumers that have room, in turn."""
        while queue.waiting and (consumer := queue.next_consumer()):
            consumer.busy += 1
            task = asyncio.ensure_future(self._handle(queue, consumer, queue.waiting.popleft()))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

    async def _handle(self, queue: MemoryQueue, consumer: MemoryConsumer, body: bytes) -> None:
        try:
            for message in decode_group(body):
                with suppress(Exception):  # RabbitMQ's client dead-letters a message whose handler fails
                    try:
                        await consumer.handler(message)
                    except GiveBack:
                        if consumer.prefetch:
                            queue.waiting.appendleft(body)
                        return
        finally:
            consumer.busy -= 1
            self.deliver(queue)

    def close(self) -> None:
        """End the handlers that still run, and start no others."""
        for queue in self.queues.values():
            queue.consumers.clear()
        for task in self._handling:
            task.cancel()

    async def handled(self) -> None:
        """Wait until the handlers of all delivered messages have returned."""
        while self._handling:
            await asyncio.wait(self._handling)


class MemoryBroker:
    """The part of `Broker` that tests without RabbitMQ use: one connection to a server."""

    def __init__(self, server: MemoryServer | None = None, namespace: str = "t") -> None:
        self.server = server or MemoryServer()
        self.topology = Topology(namespace)

    async def publish(
        self,
        message: Message,
        key: str,
        *,
        cc: tuple[str, ...] = (),
        persistent: bool = False,
        confirmed: bool = False,
        trace: object = None,
    ) -> None:
        if not self.server.route(encode(message), (key, *cc)) and (persistent or confirmed):
            raise Unroutable(f"no queue is bound to {key!r}: its receiver is not running")

    async def publish_group(self, messages: Sequence[Message], key: str, *, cc: tuple[str, ...] = ()) -> None:
        self.server.route(encode_group(messages), (key, *cc))

    async def consume(
        self, queue: Queue, handler: Handler, *, prefetch: int = 0, priority: int = 0
    ) -> Callable[[], Awaitable[None]]:
        if priority:
            raise NotImplementedError("consumers in memory have no priorities")
        kept = self.server.queues.setdefault(queue.name, MemoryQueue())
        kept.bindings |= set(queue.bindings)
        kept.has_one_active = queue.arguments.get("x-single-active-consumer", False)
        consumer = MemoryConsumer(handler, prefetch)
        kept.consumers.append(consumer)
        self.server.deliver(kept)

        async def end() -> None:
            kept.consumers.remove(consumer)
            self.server.deliver(kept)

        return end

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Do nothing: this connection is never lost."""
