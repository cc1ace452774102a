"""The running sessions of this gateway: started or resumed, fed with results, and ended."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from enum import StrEnum
from time import monotonic

from services.gateway import spans
from services.gateway.answer import Answer, RunningSession, generate_again
from services.gateway.core.admission import Admission, Demand
from services.gateway.core.completion import Completion
from services.gateway.core.reasoning import TAGS, ReasoningCounter
from services.gateway.core.turns import Wait
from services.gateway.errors import ApiError, stream_gone, unavailable
from services.gateway.metrics import ModelMetrics
from services.gateway.model import ServedModel
from services.gateway.silence import CANCELLED, SilenceWatch
from services.gateway.transport import Transport
from shared.broker.topology import DEFAULT_POOL, device_name
from shared.errors import BrokersError, Unroutable
from shared.messages import Ended, Failure, Generate, Load, Message, Result, Status, model_of
from shared.models.stop import StopStrings
from shared.models.text import Detokenizer, Tokenizer
from shared.prediction import PredictionFollower
from shared.runtime import logging, tracing
from shared.runtime.service import BackgroundTasks
from shared.slo import SloOutcome, judge
from shared.state.sessions import Session as StoredSession
from shared.state.sessions import SessionStatus

LOAD_VALID_S = 10.0
"""Time after which a Load is out of date."""
BACKLOG_S = 2.0
"""The backlog in a Load that arrives within this time after a wait began goes before the session."""
CLOSE_S = 5.0
"""Time for background work at the end."""
RESUMED = Failure(code="resumed", message="the client resumed this stream over another connection")
NOT_STARTED = SloOutcome(ttft_ms=None, tpot_ms=None, attained=False)


class Unfinished(StrEnum):
    """The treatment of an unfinished session when this gateway stops serving it."""

    CANCEL = "cancel"
    LEAVE = "leave"
    """It runs on for a while, for a gateway that collects it."""
    KEEP = "keep"
    """It runs on, because it is already collected."""


class Sessions:
    """Every running session of this gateway."""

    def __init__(
        self,
        transport: Transport,
        model: ServedModel,
        admission: Admission,
        metrics: ModelMetrics,
        *,
        stall_timeout_s: float,
        queue_timeout_s: float,
        idle_check_s: float = math.inf,
        arithmetics: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`stall_timeout_s`: longest time in which nobody works on a session. `queue_timeout_s`: longest wait of one.
        `idle_check_s`: time without results after which a session's state is read, where results can be lost.
        `arithmetics`: returns those of the usable verifiers."""
        self._transport = transport
        self._model = model
        self._admission = admission
        self._metrics = metrics
        self._idle_check_s = idle_check_s
        self._running: dict[str, RunningSession] = {}
        self._tasks = BackgroundTasks()
        self._silence = SilenceWatch(
            self,
            self._running,
            transport,
            self._tasks,
            stall_timeout_s=stall_timeout_s,
            queue_timeout_s=queue_timeout_s,
            arithmetics=arithmetics,
        )
        self._idle = asyncio.Event()
        self._log = logging.get()
        self.draining = False
        """Set to refuse new sessions."""
        self._load: tuple[float, Load] | None = None
        """The latest Load, and the time of its arrival."""

    @property
    def without_drafters(self) -> list[str]:
        """Pools that schedulers serve without drafters, by the latest Load; none once schedulers are silent."""
        if self._load is None or monotonic() - self._load[0] > LOAD_VALID_S:
            return []
        return self._load[1].without_drafters

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer."""
        return self._model.tokenizer

    @property
    def running(self) -> int:
        """Number of running sessions."""
        return len(self._running)

    @asynccontextmanager
    async def run(self, answer: Answer) -> AsyncIterator[None]:
        """Start an answer's sessions. Sessions still running at the end of the context are cancelled.

        Raises ApiError: 429 when admission refuses the request, 503 when a required service is away.
        """
        reason = "error"
        try:
            self._admit(answer)
            for generate in answer.sessions:
                self._register(answer, generate, answer.started_s)
            for index, session in enumerate(answer.running):
                await self._start(session, answer.form.pack() if answer.stream and not index else b"")
            reason = "abort"
            yield
        finally:
            for session in answer.running:
                self._end(session, reason)

    @asynccontextmanager
    async def resume(self, answer: Answer) -> AsyncIterator[None]:
        """Collect an answer's sessions and serve them. Sessions still running at the end are cancelled.

        Raises ApiError: 404 when one is gone, 503 when RabbitMQ or Redis are away or another model is served here.
        """
        self._refuse_if_draining()
        async with AsyncExitStack() as stack:
            try:
                stored = await stack.enter_async_context(self._transport.collect(answer.session_ids))
            except BrokersError as error:
                raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
            try:
                self._take_over(answer, stored)
                self._log.info("stream resumed", session=answer.answer_id, completions=len(stored))
                answer.wake.set()
                yield
            finally:
                for session in answer.running:
                    self._end(session, "abort")

    def _take_over(self, answer: Answer, stored: list[StoredSession | None]) -> None:
        """Go on with collected sessions from their committed tokens."""
        found = [session for session in stored if session is not None]
        if len(found) < len(stored):
            raise stream_gone()
        if any(model_of(session.request.fingerprint) != self._model.fingerprint for session in found):
            raise unavailable("this gateway serves another model than the one of this stream", "wrong_model")
        for session in found:
            length = len(session.tokens) if session.left_at is None else session.left_at
            answer.charged_tokens += length - session.request.prompt_len
            answer.sessions.append(generate_again(session, answer.form))
        answer.charged_tokens += answer.form.prompt_tokens
        for generate, session in zip(answer.sessions, found, strict=True):
            if (before := self._running.get(generate.session)) is not None:
                self.fail(before, RESUMED, Unfinished.KEEP)
            started_s = answer.started_s - session.elapsed_ms / 1000
            running = self._register(answer, generate, started_s)
            # Returning does not prolong the stall timeout, however often a client does it.
            running.wait.since_s = monotonic() - session.idle_ms / 1000
            running.wait.had_turn = session.first_ms is not None
            if session.first_ms is not None:
                running.first_s = started_s + session.first_ms / 1000
                running.token_s = monotonic()
            prompt_len = session.request.prompt_len
            running.completion.committed(
                prompt_len, session.tokens[prompt_len:], session.finish, committed_in=session.committed_in
            )
            if running.completion.done:
                self._end(running, str(running.completion.finish))
            elif session.status is SessionStatus.CANCELLED:
                self.fail(running, CANCELLED)
            elif running.completion.gap:
                self._silence.check(running)  # for the log-probabilities

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise unavailable("this gateway is shutting down; try again", "shutting_down")

    def _admit(self, answer: Answer) -> None:
        self._refuse_if_draining()
        service_class, now = answer.form.service_class, monotonic()
        prompts = tuple(len(generate.prompt) for generate in answer.sessions)
        demand = Demand(service_class, answer.sessions[0].slo, prompts, (now - answer.started_s) * 1000)
        if (refusal := self._admission.ask(demand, now * 1000)) is None:
            answer.unreachable = self._admission.unreachable(demand, now * 1000)
            return
        self._log.info("request refused", code=refusal.code, reason=refusal.message, service_class=service_class)
        self._metrics.refused(service_class, refusal.code, len(prompts))
        for generate in answer.sessions:
            self._report(generate, "refused", code=refusal.code)
        raise ApiError(429, refusal.message, code=refusal.code, retry_after_s=refusal.retry_after_s)

    def _register(self, answer: Answer, generate: Generate, started_s: float) -> RunningSession:
        now = monotonic()
        tools, thinks = answer.form.tools, answer.form.thinks is not None
        shown = [*(TAGS if thinks else ()), *(() if tools is None else tools.calls.shown)]
        completion = Completion(
            prompt_len=len(generate.prompt),
            stop_ids=frozenset(generate.stop_ids),
            detokenizer=Detokenizer(self._model.tokenizer, shown),
            stops=StopStrings(answer.form.stops),
            echo=answer.form.echoes[len(answer.running)],
            include_stop=answer.form.include_stop,
            min_tokens=answer.form.min_tokens,
            logprobs=generate.sampling.logprobs,
            prompt_only=answer.form.prompt_only,
            tags=StopStrings(TAGS) if thinks else None,
            reasoning=ReasoningCounter(is_open=bool(answer.form.thinks)) if thinks else None,
            predicted=None if answer.predicted is None else PredictionFollower(answer.predicted),
        )
        wait = Wait(answer.form.pool, started_s, now)
        check_s = now + self._idle_check_s
        session = RunningSession(generate, completion, answer, started_s, wait, self._idle_check_s, check_s)
        session.starting = not answer.resumed
        about: tracing.Attributes = {
            "wisp.session": generate.session,
            "gen_ai.usage.input_tokens": len(generate.prompt),
        }
        session.span = tracing.current().child("completion", about)
        answer.running.append(session)
        self._running[session.session_id] = session
        self._admission.start(
            session.session_id, generate.service_class, generate.slo, len(generate.prompt), now * 1000
        )
        self._metrics.running.inc()
        self._metrics.prompt_tokens.inc(len(generate.prompt))
        return session

    async def _start(self, session: RunningSession, resume_record: bytes) -> None:
        pool = session.answer.form.pool
        elapsed_ms = (monotonic() - session.started_s) * 1000
        generate = session.generate.model_copy(update={"elapsed_ms": elapsed_ms})
        with tracing.active(session.span):
            session.start = asyncio.create_task(self._transport.start(generate, pool, resume_record=resume_record))
        try:
            await session.start
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling() or self._running.get(session.session_id) is session:
                raise
        except Unroutable as error:
            if pool.startswith(device_name("")):
                text = f"{pool!r} has no queue: import the definitions that contain its name"
                raise unavailable(text, "no_drafter") from error
            where = "" if pool == DEFAULT_POOL else f" in pool {pool!r}"
            raise unavailable(
                f"no drafter is running{where}, and no scheduler stands in (WISP_STAND_IN_POOLS); try again when one "
                "has started",
                "no_drafter",
            ) from error
        except BrokersError as error:
            raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
        if self._running.get(session.session_id) is not session:
            # It was ended meanwhile, perhaps before there was anything to cancel.
            self._tasks.spawn(self._transport.cancel(session.session_id, "ended while it was started"))
            return
        session.starting = False
        session.wait.since_s = now = monotonic()
        session.check_s = now + session.pause_s

    async def receive(self, message: Message) -> None:
        """Handle a message for this gateway. Results of sessions that do not run here are ignored."""
        if isinstance(message, Load):
            self._note_load(message)
        elif isinstance(message, Result) and (session := self._running.get(message.session)) is not None:
            self._log.debug("result received", round=message.round, status=message.status)
            self._admission.answered(message.session)
            completion = session.completion
            tokens, length = completion.tally.tokens, completion.length
            completion.result(message)
            grew = completion.length > length
            self.fed(session, completion.tally.tokens - tokens, grew or message.status is Status.PREFILLED)
            if completion.gap:
                self._silence.check(session)

    def _note_load(self, load: Load) -> None:
        now = monotonic()
        self._admission.update(load, now * 1000)
        self._silence.mixes = load.mixed_arithmetic
        if load.without_room:
            self._silence.turns.record_room_awaited(now)
        self._load = now, load
        for session in self._running.values():
            if now - session.wait.since_s <= BACKLOG_S:
                session.wait.backlog_s = max(session.wait.backlog_s, load.backlog_ms / 1000)

    def fed(self, session: RunningSession, new_tokens: int, progressed: bool) -> None:
        """Go on after a session has got tokens, or made progress without any."""
        now = monotonic()
        if progressed:
            self._silence.turns.record(session.wait, now)
            session.pause_s = self._idle_check_s
        session.check_s = now + session.pause_s
        self._metrics.generation_tokens.inc(new_tokens)
        if new_tokens and session.first_s is None:
            session.first_s = now
            session.span.event("first token")
            self._metrics.ttft_s.observe(now - session.started_s)
        elif new_tokens:
            for _ in range(new_tokens):
                self._metrics.inter_token_s.observe((now - session.token_s) / new_tokens)
        if new_tokens:
            session.token_s = now
        if session.completion.done:
            self._end(session, "error" if session.completion.failure else str(session.completion.finish))
        session.answer.wake.set()

    def fail(self, session: RunningSession, failure: Failure, unfinished: Unfinished = Unfinished.CANCEL) -> None:
        """End a session with a failure."""
        self._log.warning("session failed", session=session.session_id, code=failure.code, reason=failure.message)
        session.completion.fail(failure)
        self._end(session, "error", unfinished)
        session.answer.wake.set()

    async def watch(self) -> None:
        """Watch silent sessions for ever."""
        await self._silence.watch()

    def _end(self, session: RunningSession, reason: str, unfinished: Unfinished = Unfinished.CANCEL) -> None:
        """Stop serving a session; nothing happens when that was done before."""
        if self._running.get(session.session_id) is not session:
            return
        del self._running[session.session_id]
        if session.start is not None:
            session.start.cancel()
        if not self._running:
            self._idle.set()
        self._count_end(session, reason)
        session.end_reason = reason
        if session.span:
            spans.end_completion(session, reason)
        if reason == "abort" and session.answer.form.keep:
            unfinished = Unfinished.LEAVE
        completion = session.completion
        if completion.stopped_early:
            self._tasks.spawn(self._transport.cancel(session.session_id, "stop string"))
        elif completion.finish is None and unfinished is Unfinished.CANCEL:
            self._tasks.spawn(self._transport.cancel(session.session_id, reason))
        elif completion.finish is None and unfinished is Unfinished.LEAVE:
            self._tasks.spawn(self._transport.leave(session.session_id, completion.length))

    def _count_end(self, session: RunningSession, reason: str) -> None:
        """Record a session's end in admission and metrics, and report it."""
        now = monotonic()
        self._admission.end(session.session_id, now * 1000)
        generate, completion = session.generate, session.completion
        total_s = now - session.started_s
        first_ms = None if session.first_s is None else (session.first_s - session.started_s) * 1000
        tokens = completion.tally.tokens
        session.outcome = judge(generate.slo, completion.finish is not None, tokens, first_ms, total_s * 1000)
        self._metrics.running.dec()
        attained = session.outcome.attained
        self._metrics.finished(reason, completion.tally, total_s, generate.service_class, attained)
        self._report(generate, reason, tokens, session.outcome)

    def _report(
        self, generate: Generate, reason: str, tokens: int = 0, outcome: SloOutcome = NOT_STARTED, code: str = ""
    ) -> None:
        ended = Ended(
            session=generate.session,
            service_class=generate.service_class,
            slo=generate.slo,
            reason=reason,
            code=code,
            prompt_tokens=len(generate.prompt),
            tokens=tokens,
            ttft_ms=outcome.ttft_ms,
            tpot_ms=outcome.tpot_ms,
            attained=outcome.attained,
        )
        self._tasks.spawn(self._transport.report(ended))

    async def drain(self, grace_s: float) -> None:
        """Refuse new sessions, wait up to `grace_s` for the running ones, then fail the rest."""
        self.draining = True
        if self._running:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        for session in tuple(self._running.values()):
            streamed = session.answer.stream
            way = "resume with Last-Event-ID at another, or send" if streamed else "send"
            failure = Failure(code="shutting_down", message=f"this gateway is shutting down; {way} the request again")
            self.fail(session, failure, Unfinished.LEAVE if streamed else Unfinished.CANCEL)
        await self._tasks.ended(CLOSE_S)
