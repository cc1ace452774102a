"""Sessions on their way through the other services: started, fed with results, repaired, given up, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Protocol

from services.gateway.errors import ApiError, unavailable
from services.gateway.metrics import Metrics
from services.gateway.plan import Plan
from services.gateway.run import Live, Run
from services.gateway.session import Session
from shared import logging, topology
from shared.errors import BrokersError, Unroutable
from shared.messages import Cancel, Failure, Generate, Message, Result, Status
from shared.store import Progress, Request, SessionStatus

WATCH_INTERVAL_S = 0.1
LONGEST_PAUSE_S = 15.0
"""Longest time between two looks at a silent session's state."""


class Publisher(Protocol):
    """What is needed of `shared.broker.Broker`."""

    async def publish(self, message: Message, key: str, *, cc: tuple[str, ...] = (), persistent: bool = False) -> None:
        """See there."""


class SessionStore(Protocol):
    """What is needed of `shared.store.Store`."""

    async def create(self, request: Request, prompt: Sequence[int], elapsed_ms: float = 0.0) -> None:
        """See there."""

    async def progress(self, session: str, from_len: int) -> Progress | None:
        """See there."""

    async def cancel(self, session: str) -> None:
        """See there."""


class Backend:
    """Every running session of this gateway."""

    def __init__(
        self,
        publisher: Publisher,
        store: SessionStore,
        new_session: Callable[[Plan], Session],
        metrics: Metrics,
        *,
        instance: str,
        fingerprint: str,
        vocab_fingerprint: str,
        max_sessions: int,
        idle_check_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._publisher = publisher
        self._store = store
        self._new_session = new_session
        self._metrics = metrics
        self._instance = instance
        self._fingerprint = fingerprint
        self._vocab_fingerprint = vocab_fingerprint
        self._max_sessions = max_sessions
        self._idle_check_s = idle_check_s
        self._stall_timeout_s = stall_timeout_s
        self._live: dict[str, Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._log = logging.get()
        self.draining = False
        """Set to refuse new sessions."""

    @property
    def running(self) -> int:
        """Sessions that have not ended."""
        return len(self._live)

    @asynccontextmanager
    async def run(self, plans: Sequence[Plan], started_s: float) -> AsyncIterator[Run]:
        """Start a request's sessions; those that run at the end of the context are cancelled.

        `started_s` is when the request came in. Raises ApiError: 429 when too many sessions run, 503 when a part that
        is needed is away.
        """
        self._admit(len(plans))
        run = Run([])
        reason = "error"
        try:
            for plan in plans:
                run.lives.append(self._register(plan, run.wake, started_s))
            for live in run.lives:
                await self._start(live)
            reason = "abort"
            yield run
        finally:
            for live in run.lives:
                self._end(live, reason)

    def _admit(self, count: int) -> None:
        if self.draining:
            raise unavailable("this gateway is shutting down; try again", "shutting_down")
        if self.running + count > self._max_sessions:
            raise ApiError(
                429,
                f"{self.running} texts are being generated and {count} more would pass the limit of "
                f"{self._max_sessions}; try again later",
                code="too_many_sessions",
                retry_after_s=1,
            )

    def _register(self, plan: Plan, wake: asyncio.Event, started_s: float) -> Live:
        now = monotonic()
        live = Live(
            plan, self._new_session(plan), wake, started_s, now, self._idle_check_s, check_s=now + self._idle_check_s
        )
        self._live[plan.session] = live
        self._metrics.running.inc()
        self._metrics.prompt_tokens.inc(len(plan.prompt))
        return live

    async def _start(self, live: Live) -> None:
        plan = live.plan
        record = Request(
            session=plan.session,
            gateway=self._instance,
            prompt_len=len(plan.prompt),
            sampling=plan.sampling,
            stop_ids=plan.stop_ids,
            max_tokens=plan.max_tokens,
            fingerprint=self._fingerprint,
            slo=plan.slo,
        )
        try:
            await self._store.create(record, plan.prompt, (monotonic() - live.started_s) * 1000)
            generate = Generate(
                session=plan.session,
                gateway=self._instance,
                prompt=plan.prompt,
                sampling=plan.sampling,
                stop_ids=plan.stop_ids,
                max_tokens=plan.max_tokens,
                fingerprint=self._fingerprint,
                vocab_fingerprint=self._vocab_fingerprint,
                slo=plan.slo,
                draft=plan.draft,
                elapsed_ms=(monotonic() - live.started_s) * 1000,
            )
            await self._publisher.publish(generate, topology.generate(), persistent=True)
        except Unroutable as error:
            raise unavailable("no drafter is running; try again when one has started", "no_drafter") from error
        except BrokersError as error:
            raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error

    async def receive(self, message: Message) -> None:
        """Handle a message from this gateway's queue; results of sessions that have ended are ignored."""
        if isinstance(message, Result) and (live := self._live.get(message.session)) is not None:
            self._log.debug("result received", round=message.round, status=message.status)
            tokens = live.session.tally.tokens
            length = live.session.length
            live.session.result(message)
            grew = live.session.length > length
            self._fed(live, live.session.tally.tokens - tokens, grew or message.status is Status.PREFILLED)
            if live.session.gap:
                self._check(live)

    def _fed(self, live: Live, new_tokens: int, progressed: bool) -> None:
        now = monotonic()
        if progressed:
            live.progress_s = now
            live.pause_s = self._idle_check_s
        live.check_s = now + live.pause_s
        self._metrics.generation_tokens.inc(new_tokens)
        if new_tokens and live.first_s is None:
            live.first_s = now
            self._metrics.ttft_s.observe(now - live.started_s)
        elif new_tokens:
            for _ in range(new_tokens):
                self._metrics.inter_token_s.observe((now - live.token_s) / new_tokens)
        if new_tokens:
            live.token_s = now
        if live.session.done:
            self._end(live, "error" if live.session.failure else str(live.session.finish))
        live.wake.set()

    async def watch(self) -> None:
        """Look after silent sessions, for ever: read their state, and give them up after a long stall."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = monotonic()
            for live in tuple(self._live.values()):
                if now - live.progress_s >= self._stall_timeout_s:
                    text = (
                        f"no token came for {self._stall_timeout_s:g} s: no drafter or verifier works on this session, "
                        "or they are overloaded; try again later"
                    )
                    self._fail(live, Failure(code="timeout", message=text))
                elif now >= live.check_s:
                    live.pause_s = min(2 * live.pause_s, LONGEST_PAUSE_S)
                    live.check_s = now + live.pause_s
                    self._check(live)

    def _check(self, live: Live) -> None:
        live.check_again = live.checking
        if not live.checking:
            live.checking = True
            self._spawn(self._repair(live))

    async def _repair(self, live: Live) -> None:
        """Go on from what Redis holds, where results were lost."""
        session = live.session
        from_len = session.length
        try:
            progress = await self._store.progress(live.plan.session, from_len)
        except BrokersError as error:
            self._log.warning("session's state not read", session=live.plan.session, error=str(error))
            return
        finally:
            live.checking = False
        if live.plan.session not in self._live:
            return
        if progress is None or progress.status is SessionStatus.CANCELLED:
            gone = progress is None
            text = "the state of this session was lost" if gone else "this session was cancelled"
            self._fail(
                live, Failure(code="session_gone" if gone else "cancelled", message=f"{text}; send the request again")
            )
            return
        tokens, length = session.tally.tokens, session.length
        session.committed(from_len, progress.tokens, progress.finish)
        if live.check_again:
            self._check(live)
        if session.length > length or session.done:
            self._log.info("session repaired", session=live.plan.session, tokens=session.length - length)
            self._fed(live, session.tally.tokens - tokens, progressed=True)

    def _fail(self, live: Live, failure: Failure) -> None:
        self._log.warning("session failed", session=live.plan.session, code=failure.code, reason=failure.message)
        live.session.fail(failure)
        self._end(live, "error")
        live.wake.set()

    def _end(self, live: Live, reason: str) -> None:
        """Forget a session, once; cancel it unless it has come to its own end."""
        if self._live.pop(live.plan.session, None) is None:
            return
        if not self._live:
            self._idle.set()
        session = live.session
        self._metrics.running.dec()
        self._metrics.finished(reason, session.tally, monotonic() - live.started_s)
        if session.finish is None or session.stopped_early:
            self._spawn(self._cancel(live.plan.session, "stop string" if session.stopped_early else reason))

    async def _cancel(self, session: str, reason: str) -> None:
        async def mark() -> None:
            try:
                await self._store.cancel(session)
            except BrokersError as error:
                self._log.warning("session not marked as cancelled", session=session, error=str(error))

        tell = self._publisher.publish(Cancel(session=session, reason=reason), topology.CANCEL)
        await asyncio.gather(mark(), tell)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("background work failed", error=repr(error), exc_info=error)

    async def drain(self, grace_s: float) -> None:
        """Refuse new sessions, let the running ones end for `grace_s` seconds, fail those that are left."""
        self.draining = True
        if self._live:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        for live in tuple(self._live.values()):
            text = "this gateway is shutting down; send the request again"
            self._fail(live, Failure(code="shutting_down", message=text))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
