"""Sessions on their way through the other services: started, fed with results, repaired, given up, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from functools import partial
from time import monotonic
from typing import Any

from services.gateway.answer import Live, Run
from services.gateway.core.admission import Admission, Demand
from services.gateway.core.completion import Session
from services.gateway.core.slo import Outcome, judge
from services.gateway.errors import ApiError, unavailable
from services.gateway.metrics import Metrics
from services.gateway.request import Plan
from services.gateway.transport import Publisher, SessionStore, Starter
from shared.broker import topology
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import Queue
from shared.errors import BrokersError
from shared.messages import Cancel, Ended, Failure, Load, Message, Result, Status
from shared.runtime import logging
from shared.state.store import Session as Stored
from shared.state.store import SessionStatus

WATCH_INTERVAL_S = 0.1
LONGEST_PAUSE_S = 15.0
"""Longest time between two looks at a silent session's state."""
STORE_TRIES, STORE_AGAIN_S = 60, 1.0
"""While Redis is away. A gateway that ends before it is back leaves its sessions to `Store.reap`."""
CANCELLED = Failure(code="cancelled", message="this session was cancelled; send the request again")
TAKEN = Failure(code="resumed", message="the client goes on with this stream over another connection")
GONE = Failure(code="session_gone", message="the state of this session was lost; send the request again")
NOBODY_WORKS = "no drafter of pool {pool!r} or no verifier works on this session, or they are overloaded"
NOTHING = Outcome(ttft_ms=None, tpot_ms=None, attained=False)
"""What became of a text that was never started."""


class Fate(StrEnum):
    """What becomes of a session that has not come to its own end when its gateway forgets it."""

    CANCEL = "cancel"
    LEAVE = "leave"
    """It goes on for a while, for whichever gateway collects it next."""
    KEEP = "keep"
    """It goes on, for it is collected already."""


class Backend:
    """Every running session of this gateway."""

    def __init__(
        self,
        publisher: Publisher,
        store: SessionStore,
        new_session: Callable[[Plan], Session],
        metrics: Metrics,
        admission: Admission,
        *,
        instance: str,
        fingerprint: str,
        vocab_fingerprint: str,
        idle_check_s: float,
        stall_timeout_s: float,
        resume_s: float,
        queue: Queue | None = None,
        session_keys: SessionKeys | None = None,
        stall_reason: str = NOBODY_WORKS,
    ) -> None:
        """queue: this gateway's own, into which the results of sessions that began elsewhere have to come as well; None
        where no other gateway's streams are gone on with. stall_reason: why a session may have stalled, for its client;
        {pool!r} is the session's pool.
        """
        self._instance = instance
        self._queue = queue
        self._publisher = publisher
        self._store = store
        self._new_session = new_session
        self._metrics = metrics
        self._admission = admission
        self._starter = Starter(
            publisher,
            store,
            instance,
            fingerprint,
            vocab_fingerprint,
            int(resume_s * 1000),
            session_keys or SessionKeys(None),
        )
        self._idle_check_s = idle_check_s
        self._stall_timeout_s = stall_timeout_s
        self._stall_reason = stall_reason
        self._live: dict[str, Live] = {}
        self._heard: set[str] = set()
        """Other gateways whose results come here as well."""
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

        `started_s` is when the request came in. Raises ApiError: 429 when admission refuses it, 503 when a part that is
        needed is away.
        """
        self._admit(plans, started_s)
        run = Run([])
        reason = "error"
        try:
            for plan in plans:
                run.lives.append(self._register(plan, run.wake, started_s))
            for live in run.lives:
                await self._starter.start(live.plan, started_s)
            reason = "abort"
            yield run
        finally:
            for live in run.lives:
                self._end(live, reason)

    async def kept(self, answer: str) -> bytes | None:
        """What a gateway kept to let others go on with this answer. Raises BrokersError."""
        return await self._store.kept(answer)

    async def collect(self, sessions: Sequence[str]) -> list[Stored | None]:
        """Take these sessions over from whichever gateway has them; None for one that is gone.

        Raises BrokersError, also where their results cannot be had.
        """
        if not all([await self._store.collect(session, self._instance) for session in sessions]):
            return [None for _ in sessions]
        for origin in {found.request.gateway for found in await self._store.read(sessions) if found is not None}:
            # Rounds under way, and a drafter that has the first Generate, still send their results there.
            if self._queue is not None and origin != self._instance and origin not in self._heard:
                await self._publisher.bind(self._queue, topology.result(origin))
                self._heard.add(origin)
        return await self._store.read(sessions)

    @asynccontextmanager
    async def resume(self, plans: Sequence[Plan], states: Sequence[Stored], started_s: float) -> AsyncIterator[Run]:
        """Go on with a request's sessions, as `collect` found them; those that run at the end are cancelled.

        Raises ApiError.
        """
        if self.draining:
            raise unavailable("this gateway is shutting down; try again", "shutting_down")
        run = Run([])
        try:
            for plan, state in zip(plans, states, strict=True):
                if (before := self._live.get(plan.session)) is not None:
                    self._fail(before, TAKEN, Fate.KEEP)
                began_s = started_s - state.elapsed_ms / 1000
                live = self._register(plan, run.wake, began_s)
                run.lives.append(live)
                live.origin = state.request.gateway
                # It may stall no longer than at one gateway, however often its client comes back.
                live.progress_s = monotonic() - state.idle_ms / 1000
                if state.first_ms is not None:
                    live.first_s = began_s + state.first_ms / 1000
                    live.token_s = monotonic()
                live.session.committed(len(plan.prompt), state.tokens[len(plan.prompt) :], state.finish)
                if live.session.done:
                    self._end(live, str(live.session.finish))
                elif state.status is SessionStatus.CANCELLED:
                    self._fail(live, CANCELLED)
            self._log.info("stream resumed", session=plans[0].session, texts=len(plans))
            run.wake.set()
            yield run
        finally:
            for live in run.lives:
                self._end(live, "abort")

    def _admit(self, plans: Sequence[Plan], started_s: float) -> None:
        if self.draining:
            raise unavailable("this gateway is shutting down; try again", "shutting_down")
        first = plans[0]
        now = monotonic()
        prompts = tuple(len(plan.prompt) for plan in plans)
        demand = Demand(first.service_class, first.slo, prompts, (now - started_s) * 1000)
        if (refusal := self._admission.ask(demand, now * 1000)) is None:
            return
        self._log.info("request refused", code=refusal.code, reason=refusal.message, service_class=first.service_class)
        self._metrics.refused(first.service_class, refusal.code, len(plans))
        for plan in plans:
            self._spawn(self._tell_end(plan, "refused", code=refusal.code))
        raise ApiError(429, refusal.message, code=refusal.code, retry_after_s=refusal.retry_after_s)

    def _register(self, plan: Plan, wake: asyncio.Event, started_s: float) -> Live:
        now = monotonic()
        live = Live(
            plan, self._new_session(plan), wake, started_s, now, self._idle_check_s, check_s=now + self._idle_check_s
        )
        self._live[plan.session] = live
        self._admission.start(plan.session, plan.service_class, plan.slo, len(plan.prompt), now * 1000)
        self._metrics.running.inc()
        self._metrics.prompt_tokens.inc(len(plan.prompt))
        return live

    async def receive(self, message: Message) -> None:
        """Handle a message from this gateway's queue; results of sessions that have ended are ignored."""
        if isinstance(message, Load):
            self._admission.hear(message, monotonic() * 1000)
        elif isinstance(message, Result) and (live := self._live.get(message.session)) is not None:
            self._log.debug("result received", round=message.round, status=message.status)
            self._admission.answered(message.session)
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
                    why = self._stall_reason.format(pool=live.plan.pool)
                    text = f"no token came for {self._stall_timeout_s:g} s: {why}; try again later"
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
        if progress is None:
            self._fail(live, GONE)
            return
        tokens, length = session.tally.tokens, session.length
        session.committed(from_len, progress.tokens, progress.finish)
        if progress.status is SessionStatus.CANCELLED and not session.done:
            self._fail(live, CANCELLED)
            return
        if live.check_again:
            self._check(live)
        if session.length > length or session.done:
            self._log.info("session repaired", session=live.plan.session, tokens=session.length - length)
            self._fed(live, session.tally.tokens - tokens, progressed=True)

    def _fail(self, live: Live, failure: Failure, fate: Fate = Fate.CANCEL) -> None:
        self._log.warning("session failed", session=live.plan.session, code=failure.code, reason=failure.message)
        live.session.fail(failure)
        self._end(live, "error", fate)
        live.wake.set()

    def _end(self, live: Live, reason: str, fate: Fate = Fate.CANCEL) -> None:
        """Forget a session, once. `fate` is for one that has not come to its own end."""
        if self._live.get(live.plan.session) is not live:
            return
        del self._live[live.plan.session]
        if not self._live:
            self._idle.set()
        session = live.session
        now = monotonic()
        self._admission.end(live.plan.session, now * 1000)
        total_s = now - live.started_s
        first_ms = None if live.first_s is None else (live.first_s - live.started_s) * 1000
        outcome = judge(live.plan.slo, session.finish is not None, session.tally.tokens, first_ms, total_s * 1000)
        live.outcome = outcome
        self._metrics.running.dec()
        self._metrics.finished(reason, session.tally, total_s, live.plan.service_class, outcome.attained)
        self._spawn(self._tell_end(live.plan, reason, session.tally.tokens, outcome))
        if not any(other.origin == live.origin for other in self._live.values()) and live.origin in self._heard:
            self._heard.discard(live.origin)
            self._spawn(self._unhear(live.origin))
        if reason == "abort" and live.plan.keep:
            fate = Fate.LEAVE
        if session.stopped_early:
            self._spawn(self._cancel(live.plan.session, "stop string"))
        elif session.finish is None and fate is Fate.CANCEL:
            self._spawn(self._cancel(live.plan.session, reason))
        elif session.finish is None and fate is Fate.LEAVE:
            self._spawn(self._leave(live.plan.session, session.length))

    async def _tell_end(
        self, plan: Plan, reason: str, tokens: int = 0, outcome: Outcome = NOTHING, code: str = ""
    ) -> None:
        ended = Ended(
            session=plan.session,
            service_class=plan.service_class,
            slo=plan.slo,
            reason=reason,
            code=code,
            prompt_tokens=len(plan.prompt),
            tokens=tokens,
            ttft_ms=outcome.ttft_ms,
            tpot_ms=outcome.tpot_ms,
            attained=outcome.attained,
        )
        await self._publisher.publish(ended, topology.ENDED)

    async def _cancel(self, session: str, reason: str) -> None:
        cancel = Cancel(session=session, reason=reason)
        mark = partial(self._store.cancel, session, self._instance)
        try:
            if not await mark():
                self._log.info("session is another gateway's by now", session=session)
                return
        except BrokersError:
            # Those who work on it need not wait for Redis.
            await self._publisher.publish(cancel, topology.CANCEL)
            await self._until_stored(mark, session)
            return
        await self._publisher.publish(cancel, topology.CANCEL)

    async def _leave(self, session: str, length: int) -> None:
        await self._until_stored(partial(self._store.leave, session, self._instance, length), session)

    async def _until_stored(self, write: Callable[[], Awaitable[object]], session: str) -> None:
        for _ in range(STORE_TRIES):
            try:
                await write()
                return
            except BrokersError as error:
                self._log.warning("session's end not stored yet", session=session, error=str(error))
            await asyncio.sleep(STORE_AGAIN_S)

    async def _unhear(self, origin: str) -> None:
        assert self._queue is not None
        try:
            await self._publisher.unbind(self._queue, topology.result(origin))
        except BrokersError as error:
            self._log.warning("still getting another gateway's results", gateway=origin, error=str(error))

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
            streamed = live.plan.streamed
            way = "go on with Last-Event-ID at another, or send" if streamed else "send"
            failure = Failure(code="shutting_down", message=f"this gateway is shutting down; {way} the request again")
            self._fail(live, failure, Fate.LEAVE if streamed else Fate.CANCEL)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
