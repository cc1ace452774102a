"""The load of one point: sessions in a closed loop, or an open process of arrivals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from services.tools.bench.load.client import LoadClient
from services.tools.bench.load.core.measures import GeneratorLag, Window, lag_of
from services.tools.bench.load.core.record import Ending, RequestRecord
from services.tools.bench.load.core.requests import LoadRequest, RequestSource
from services.tools.bench.load.workload import Workload

TICK_S = 0.02
"""Period of the timer that measures the lag of the event loop."""
FAILED_WAIT_S = 1.0
"""Shortest pause of a session after an error."""
PROGRESS_S = 1.0
DRAIN_POLL_S = 0.1


@dataclass
class PointRun:
    """One measured point: a number of sessions during a window. Call `run` once."""

    client: LoadClient
    workload: Workload
    requests: RequestSource
    sessions: int
    first: int
    """Number of each session's first request."""
    window: Window
    show: Callable[[str], None] = lambda text: None
    """Called with the progress, every second."""
    records: list[RequestRecord] = field(default_factory=list)
    asked: list[LoadRequest] = field(default_factory=list)
    _running: dict[asyncio.Task[RequestRecord], float] = field(default_factory=dict)
    """Running requests, with the time at which they were due."""
    _began_s: float = 0.0
    _late_ms: list[float] = field(default_factory=list)

    async def run(self) -> GeneratorLag:
        """Send requests until all requests of the window have ended or the drain is over; return the generator's lag.

        The load continues until then, so that requests at the end of the window meet the same load as the others.
        """
        self._began_s, used_s = time.perf_counter(), time.process_time()
        workers = [asyncio.create_task(work) for work in (*self._load(), self._measure_lag(), self._show_progress())]
        end_s = self._began_s + self.window.end_s
        try:
            await self._watch(workers, end_s + TICK_S)
            while self._counted_running() and time.perf_counter() < end_s + self.window.drain_s:
                await self._watch(workers, time.perf_counter() + DRAIN_POLL_S)
        finally:
            await _cancelled(workers)
            await _cancelled(list(self._running))
        wall_s = time.perf_counter() - self._began_s
        sent_ms = [record.lag_ms for record in self.records]
        return lag_of(sent_ms, self._late_ms, (time.process_time() - used_s) / wall_s)

    @staticmethod
    async def _watch(workers: Collection[asyncio.Task[None]], until_s: float) -> None:
        """Wait until a time. Raises the error of a worker at once."""
        done, _ = await asyncio.wait(
            workers, timeout=until_s - time.perf_counter(), return_when=asyncio.FIRST_EXCEPTION
        )
        for task in done:
            task.result()

    def _load(self) -> Iterator[Coroutine[Any, Any, None]]:
        if self.workload.arrivals.process != "closed":
            yield self._open()
            return
        for session, start_s in enumerate(self.workload.starts_s(self.sessions, self.window.warm_up_s / 2)):
            yield self._session(session, self._began_s + start_s)

    async def _session(self, session: int, due_s: float) -> None:
        number = self.first
        while True:
            request = self.requests.request(session, number)
            await _until(due_s)
            task = self._start(request, due_s)
            # `await task` would pass a cancellation of this session on to the request, and then go on with its record.
            await asyncio.wait({task})
            record = task.result()
            number += 1
            wait_s = self.requests.request(session, number).think_s
            if record.ending is not Ending.COMPLETE:
                wait_s = max(wait_s, record.retry_after_s or FAILED_WAIT_S)
            due_s = time.perf_counter() + wait_s

    async def _open(self) -> None:
        for at_s, session, number in self.workload.arrivals_s(self.sessions, self.first):
            request = self.requests.request(session, number)
            await _until(self._began_s + at_s)
            self._start(request, self._began_s + at_s)
        raise AssertionError("arrivals never end")

    def _start(self, request: LoadRequest, due_s: float) -> asyncio.Task[RequestRecord]:
        task = asyncio.create_task(self._ask(request, due_s))
        self.asked.append(request)
        self._running[task] = due_s
        task.add_done_callback(self._running.pop)
        return task

    async def _ask(self, request: LoadRequest, due_s: float) -> RequestRecord:
        record = await self.client.ask(request, self._began_s, due_s)
        self.records.append(record)
        return record

    def _counted_running(self) -> list[asyncio.Task[RequestRecord]]:
        return [task for task, due_s in self._running.items() if self.window.counts(due_s - self._began_s)]

    async def _measure_lag(self) -> None:
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self._late_ms.append(max(0.0, time.perf_counter() - due_s) * 1000)

    async def _show_progress(self) -> None:
        while True:
            gone_s = time.perf_counter() - self._began_s
            if gone_s < self.window.warm_up_s:
                doing = "warming up"
            elif gone_s < self.window.end_s:
                doing = f"{gone_s - self.window.warm_up_s:.0f} of {self.window.measure_s:.0f} s"
            else:
                doing = f"{len(self._counted_running())} requests to go"
            self.show(f"{doing}, {len(self.records)} answered")
            await asyncio.sleep(PROGRESS_S)


async def _until(due_s: float) -> None:
    if (wait_s := due_s - time.perf_counter()) > 0:
        await asyncio.sleep(wait_s)


async def _cancelled(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
