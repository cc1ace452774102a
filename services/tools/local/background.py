"""A stack in a thread of its own, so that the main thread can read the keyboard."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from types import TracebackType

from services.tools.local.service_processes import ServiceFailed
from services.tools.local.stack import Stack


class Background:
    """Context manager that runs a stack in a thread.

    `failure` is set when a process of the stack ends by itself.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.failure: ServiceFailed | None = None
        self._ready: Future[None] = Future()
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="stack")

    def __enter__(self) -> Background:
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._serve())
        try:
            self._loop.run_until_complete(self._main)
        except (asyncio.CancelledError, Exception) as error:
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async with self.stack:
            self._ready.set_result(None)
            self.failure = await self.stack.next_failure()

    def _end(self) -> None:
        if self._main is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()
