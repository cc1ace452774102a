"""Batches the calls of a draft source: each call serves all sessions whose requests arrived during the call before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

from services.drafter.core.draft import AheadRequest, Draft, DraftRequest, DraftSource, PreparedDraft
from shared.runtime import logging

Q = TypeVar("Q")
A = TypeVar("A")


class _PendingCalls(Generic[Q, A]):
    """Pending requests for one method of a source."""

    def __init__(self, call: Callable[[Sequence[Q]], list[A]], fallback: A) -> None:
        """fallback: the answer to each request of a call that fails."""
        self.call = call
        self.fallback = fallback
        self.pending: list[tuple[Q, asyncio.Future[tuple[A, float]]]] = []

    def put(self, request: Q, answer: asyncio.Future[tuple[A, float]]) -> None:
        """Add a request; the future gets the answer, and the duration of the call in milliseconds."""
        # Drop cancelled requests here: drafts ahead may stay pending for long while drafts keep coming.
        self.pending = [pending for pending in self.pending if not pending[1].done()]
        self.pending.append((request, answer))

    async def serve(self, thread: ThreadPoolExecutor) -> None:
        """Answer all pending requests in one call."""
        pending = [(request, answer) for request, answer in self.pending if not answer.done()]
        self.pending = []
        if not pending:
            return
        started = time.perf_counter()
        try:
            requests = [request for request, _ in pending]
            found = await asyncio.get_running_loop().run_in_executor(thread, self.call, requests)
        except Exception:
            # Drafts only save time; without them the text is the same.
            logging.get().exception("draft source failed")
            found = [self.fallback for _ in pending]
        elapsed_ms = (time.perf_counter() - started) * 1000
        for (_, answer), value in zip(pending, found, strict=True):
            if not answer.done():
                answer.set_result((value, elapsed_ms))


class SourceWorker:
    """A draft source, run in a thread of its own if its calls block."""

    def __init__(self, source: DraftSource) -> None:
        self.source = source
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft") if source.blocking else None
        self._drafts: _PendingCalls[DraftRequest, Draft] = _PendingCalls(source.propose, Draft())
        self._aheads: _PendingCalls[AheadRequest, list[PreparedDraft]] = _PendingCalls(source.ahead, [])

    async def draft(self, request: DraftRequest) -> tuple[Draft, float]:
        """Return the session's draft, and the milliseconds of the call that made it (0 if it needs no model)."""
        if self._thread is None or not self.source.computes(request):
            try:
                return self.source.propose([request])[0], 0.0
            except Exception:
                logging.get().exception("draft source failed")
                return Draft(), 0.0
        answer: asyncio.Future[tuple[Draft, float]] = asyncio.get_running_loop().create_future()
        self._drafts.put(request, answer)
        self._arrived.set()
        return await answer

    def ahead(self, request: AheadRequest) -> asyncio.Future[tuple[list[PreparedDraft], float]] | None:
        """Start to prepare drafts for the round after one in flight. Pending drafts go first, and stop it.

        Cancel the future when the drafts are no longer wanted. None if the source cannot draft ahead.
        """
        if self._thread is None:
            return None
        answer: asyncio.Future[tuple[list[PreparedDraft], float]] = asyncio.get_running_loop().create_future()

        def wanted() -> bool:
            return not answer.done() and not self._drafts.pending

        self._aheads.put(replace(request, wanted=wanted), answer)
        self._arrived.set()
        return answer

    async def work(self) -> None:
        """Serve `draft` and `ahead` until cancelled."""
        while True:
            await self._arrived.wait()
            if self._thread is None:
                return
            await self._drafts.serve(self._thread)
            if not self._drafts.pending:
                await self._aheads.serve(self._thread)
            if not self._drafts.pending and not self._aheads.pending:
                self._arrived.clear()

    def close(self, session_id: str) -> None:
        """Close a session of the source, in the source's thread."""
        if self._thread is None:
            self.source.close(session_id)
        else:
            self._thread.submit(self.source.close, session_id)
