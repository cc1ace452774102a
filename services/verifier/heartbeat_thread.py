"""The thread that sends a verifier's heartbeats: neither a long batch nor a busy event loop delays them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from threading import Thread
from typing import Any, TypeVar

from shared.broker.client import Broker
from shared.state.registry import Registry

T = TypeVar("T")

Connect = Callable[[], Awaitable[tuple[Broker, Registry]]]


class HeartbeatThread:
    """A thread with an event loop of its own, and connections that belong to that loop."""

    broker: Broker
    registry: Registry

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="heartbeats", daemon=True)

    async def start(self, connect: Connect) -> None:
        """Start the thread and connect in it. Raises BrokersError."""
        self._thread.start()
        try:
            self.broker, self.registry = await self.run(_await(connect))
        except BaseException:
            await self._end()
            raise

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the thread's event loop; return its result. Cancelling this cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def close(self) -> None:
        """Close the connections and end the thread."""
        try:
            await self.run(self._disconnect())
        finally:
            await self._end()

    async def _disconnect(self) -> None:
        await self.broker.close()
        await self.registry.close()

    async def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()


async def _await(connect: Connect) -> tuple[Broker, Registry]:
    return await connect()
