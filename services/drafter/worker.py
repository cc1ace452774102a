"""Calls a draft source for all sessions that are ready; those that come meanwhile make up the next call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from services.drafter.sources import Ahead, Draft, DraftRequest, DraftSource
from shared.runtime import logging

Q = TypeVar("Q")
A = TypeVar("A")


class _Calls(Generic[Q, A]):
    """Questions that wait for one kind of call."""

    def __init__(self, ask: Callable[[Sequence[Q]], list[A]], nothing: A) -> None:
        self.ask = ask
        self.nothing = nothing
        self.waiting: list[tuple[Q, asyncio.Future[tuple[A, float]]]] = []

    def put(self, question: Q) -> asyncio.Future[tuple[A, float]]:
        answer: asyncio.Future[tuple[A, float]] = asyncio.get_running_loop().create_future()
        # Those given up are dropped here: while drafts keep coming, aheads may wait for long.
        self.waiting = [waiting for waiting in self.waiting if not waiting[1].done()]
        self.waiting.append((question, answer))
        return answer

    async def serve(self, thread: ThreadPoolExecutor) -> None:
        """One call for all that wait."""
        waiting = [(question, answer) for question, answer in self.waiting if not answer.done()]
        self.waiting = []
        if not waiting:
            return
        started = time.perf_counter()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(thread, self.ask, [q for q, _ in waiting])
        except Exception:
            # Drafts only make it faster: without them the text is the same.
            logging.get().exception("draft source failed")
            answers = [self.nothing for _ in waiting]
        elapsed_ms = (time.perf_counter() - started) * 1000
        for (_, answer), found in zip(waiting, answers, strict=True):
            if not answer.done():
                answer.set_result((found, elapsed_ms))


class SourceWorker:
    """A draft source, in a thread of its own if its calls take long."""

    def __init__(self, source: DraftSource) -> None:
        self.source = source
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft") if source.blocking else None
        self._drafts: _Calls[DraftRequest, Draft] = _Calls(source.propose, Draft())
        self._aheads: _Calls[tuple[DraftRequest, Draft], Ahead | None] = _Calls(source.ahead, None)

    async def draft(self, request: DraftRequest) -> tuple[Draft, float]:
        """The session's draft, made in one call with those of others, and what the call took in milliseconds."""
        if self._thread is None:
            return self.source.propose([request])[0], 0.0
        answer = self._drafts.put(request)
        self._arrived.set()
        return await answer

    def ahead(self, request: DraftRequest, draft: Draft) -> asyncio.Future[tuple[Ahead | None, float]] | None:
        """A draft for the round after one in flight, made when no other draft is waited for; cancel it when it is not
        wanted any more. None if this source has none."""
        if self._thread is None:
            return None
        answer = self._aheads.put((request, draft))
        self._arrived.set()
        return answer

    async def work(self) -> None:
        """Serve `draft` and `ahead` forever."""
        while True:
            await self._arrived.wait()
            if self._thread is None:
                return
            await self._drafts.serve(self._thread)
            if not self._drafts.waiting:
                await self._aheads.serve(self._thread)
            if not self._drafts.waiting and not self._aheads.waiting:
                self._arrived.clear()

    def close(self, session: str) -> None:
        """Forget a session, in the thread that the source lives in."""
        if self._thread is None:
            self.source.close(session)
        else:
            self._thread.submit(self.source.close, session)
