"""One session in its drafter, from its request to its end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import structlog

from services.drafter import metrics
from services.drafter.control import SessionControl
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.observed import ObservedSession, StateRecorder
from services.drafter.core.session import DraftSession, RoundTimers, bonus_matches, verified_counts
from services.drafter.link import Deliver, Link
from services.drafter.session_drafts import MadeDraft, SessionDrafts
from services.drafter.settings import ServingOptions
from services.drafter.worker import SourceWorker
from shared.errors import MessageError
from shared.messages import Cancel, Generate, HiddenStates, Result, Status
from shared.runtime import logging, tracing
from shared.runtime.tracing import NO_SPAN
from shared.state.sessions import Session

if TYPE_CHECKING:
    from shared.grammar.token_masks import DraftGrammar


_UNTRACED: AbstractContextManager[None] = nullcontext()


class ServedSession:
    """A session's state, inbox, link and rounds."""

    def __init__(
        self,
        generate: Generate,
        drafter_id: str,
        options: ServingOptions,
        timers: RoundTimers,
        worker: SourceWorker,
        sources: tuple[str, ...],
        control: SessionControl,
        hidden_rows: HiddenRows | None,
        run_copies: int,
        open_link: Callable[[Deliver], Link],
        recorder: StateRecorder | None = None,
    ) -> None:
        """sources: names of the sources that may propose tokens. hidden_rows: None if none of them reads hidden states.
        run_copies: most draft tokens of a step by prompt lookup in its runs.
        open_link: opens the session's link. recorder: gets the received hidden states, for a draft that learns."""
        self.ended = asyncio.Event()
        self.given_back = False
        """True if another drafter goes on with the session."""
        self._started = time.monotonic()
        self._prior_ms = generate.elapsed_ms
        # Nothing is assumed to be committed. Where that is wrong, the first round's result corrects it.
        self._state = DraftSession(generate, list(generate.prompt))
        self._drafter_id = drafter_id
        self._options = options
        self._timers = timers
        self._worker = worker
        self._control = control
        self._hidden_rows = hidden_rows
        self._run_copies = run_copies
        self._recorder = recorder
        self._link = open_link(self._deliver)
        self._drafts = SessionDrafts(options, worker, sources, control, hidden_rows, self._link)
        self._inbox: asyncio.Queue[Result | Cancel | None] = asyncio.Queue()
        """Received messages; None asks to send the round in flight again."""
        self._waits_from_s: float | None = None
        """When the round in flight was sent first; None if none is in flight."""
        self._span = tracing.current()
        """The completion's span, in its gateway."""
        self._round_span = NO_SPAN
        self._log = logging.get()

    def follow(self, grammar: DraftGrammar | None) -> None:
        """Draft by the grammar of the session's text from here on; None if the text is free."""
        self._drafts.grammar = grammar

    def restore(self, stored: Session) -> None:
        """Continue from the committed tokens of a stored session."""
        generate = self._state.generate
        self._state = DraftSession(
            generate,
            stored.tokens,
            round=stored.round + 1,
            first_ms=stored.first_ms,
            committed_in=stored.committed_in,
        )
        self._prior_ms = max(stored.elapsed_ms, generate.elapsed_ms)

    async def receive(self, message: Result | HiddenStates | Cancel) -> None:
        """Take a message from the broker."""
        if isinstance(message, Cancel):
            self._link.cancel()
            self._inbox.put_nowait(message)
        else:
            await self._link.receive(message)

    @property
    def done(self) -> bool:
        """True if the session has ended by itself."""
        return self._state.done

    @property
    def trace_headers(self) -> tracing.Headers:
        """Headers of a message about the round in flight."""
        return self._round_span.headers

    def observed(self) -> ObservedSession | None:
        """Return the session for a draft that learns; None if its states are not recorded."""
        if self._recorder is None:
            return None
        generate = self._state.generate
        return ObservedSession(self._state.tokens, len(generate.prompt), generate.sampling, self._recorder)

    @property
    def tokens_left(self) -> int:
        """Most tokens that the session may still get."""
        return self._state.generate.max_tokens - self._state.output_tokens

    def give_back(self) -> None:
        """End the session here, so that another drafter can go on with it."""
        self.given_back = True
        self._link.cancel()
        self._inbox.put_nowait(Cancel(session=self._state.session_id, reason="given back"))

    def send_again(self, after_s: float = 0.0) -> None:
        """Send the round in flight again if it was sent `after_s` ago: it or its result may be lost."""
        if self._waits_from_s is not None and time.monotonic() - self._waits_from_s >= after_s:
            self._inbox.put_nowait(None)

    async def _deliver(self, message: Result | HiddenStates) -> None:
        """Take a message that has passed the session's link."""
        if isinstance(message, Result):
            self._inbox.put_nowait(message)
        elif self._hidden_rows is not None:
            try:
                self._hidden_rows.add(message)
            except MessageError as error:
                self._log.warning("hidden states ignored", error=str(error))
            else:
                if self._recorder is not None:
                    self._recorder.add(message)

    async def run(self) -> None:
        """Draft and verify round by round until the session ends or is cancelled."""
        state = self._state
        try:
            while not state.done:
                with structlog.contextvars.bound_contextvars(round=state.round), self._traced():
                    if not await self._round():
                        return
                    if state.first_ms is None and state.output_tokens:
                        state.first_ms = self._elapsed_ms()
                    if not await self._follow_run():
                        return
        finally:
            self._drafts.close()
            self._worker.close(state.session_id)
            self._control.close()
        if state.failure is not None:
            self._log.warning("session failed", code=state.failure.code, error=state.failure.message)

    def close(self) -> None:
        """Free the session's link, and let copies of its request be acknowledged."""
        self._link.close()
        self.ended.set()

    def _traced(self) -> AbstractContextManager[None]:
        """Return the context of a round and the run that follows it: with a span if the session is traced."""
        return self._traced_round() if self._span else _UNTRACED

    @contextmanager
    def _traced_round(self) -> Iterator[None]:
        self._round_span = span = self._span.child(
            "round",
            {
                "wisp.session": self._state.session_id,
                "wisp.round": self._state.round,
                "wisp.base_len": len(self._state.tokens),
            },
        )
        try:
            with tracing.active(span):
                yield
        finally:
            if self._state.failure is not None:
                span.fail(self._state.failure.code)
            span.end()

    def _elapsed_ms(self) -> float:
        """Return the time since the request's arrival at the gateway."""
        return self._prior_ms + _ms_since(self._started)

    async def _round(self) -> bool:
        """Draft, have the draft verified, and apply the result. Returns False if the session was cancelled."""
        started = time.monotonic()
        span = self._round_span.child("draft")
        try:
            made = await self._drafts.draft(self._state)
            if not await self._link.wait_for_draft(made.draft_ms, _ms_since(started)):
                return False
            if span:
                span.set(_draft_attributes(made))
        finally:
            span.end()
        metrics.DRAFT_TIME.observe(made.draft_ms / 1000)
        base_len = len(self._state.tokens)
        timer = self._timers.of(self._state)
        attempt = 0
        hidden_from = self._drafts.hidden_from(self._state)
        first_sent = time.monotonic()
        while True:
            sent = time.monotonic()
            await self._send(made, attempt, hidden_from)
            if attempt == 0:
                self._drafts.start_probes(self._state, made)
                self._drafts.start_ahead(self._state, made)
            result = await self._result(timer.timeout_ms(attempt) / 1000, first_sent)
            if result is not None:
                break
            attempt += 1
            metrics.ROUNDS_RESENT.inc()
            self._round_span.event("sent again")
            self._log.info("round is late, sending it again", attempt=attempt)
        if self._round_span:
            self._round_span.set(_outcome_attributes(result, attempt))
        if isinstance(result, Cancel):
            return False
        round_ms = _ms_since(sent)
        if attempt == 0:
            timer.learn(round_ms)
        self._learn(made, result, round_ms, resent=attempt > 0)
        self._drafts.note_choice(result)
        if self._hidden_rows is not None and len(self._state.tokens) < base_len:
            self._hidden_rows.truncate(len(self._state.tokens))
        self._drafts.keep_ahead()
        return True

    async def _follow_run(self) -> bool:
        """Take the tokens that the verifier decodes by itself, until that ends. Returns False if it was cancelled.

        A run that is silent for too long, or of which a report is lost, ends here; the next round shows where it is. A
        round in the middle of a run halts it.
        """
        if not self._state.run_left or self._state.done:
            return True
        before = len(self._state.tokens)
        span = self._round_span.child("run")
        try:
            return await self._take_run()
        finally:
            if span:
                span.set({"wisp.tokens": len(self._state.tokens) - before})
            span.end()

    async def _take_run(self) -> bool:
        state = self._state
        halted = False
        while state.run_left and not state.done:
            if not halted and self._is_tempted():
                halted = True
                await self._send(self._drafts.empty(state), 0, None)
            known = len(state.tokens)
            result = await self._result(self._timers.of(state).timeout_ms(0) / 1000, time.monotonic())
            if isinstance(result, Cancel):
                return False
            if result is None:
                self._log.info("run is late, asking for its tokens")
                state.run_left = 0
                return True
            self._drafts.note_choice(result)
            self._control.learn_run(len(state.tokens) - known, result.verify_ms)
        return True

    def _is_tempted(self) -> bool:
        """Return whether a probe has just shown that its source is worth halting the run."""
        round_ = self._control.ahead(
            self._state.draft_room(self._options.draft_length), self._state.generate.sampling.temperature
        )
        return any(round_.wants(source) for source in self._drafts.settle_probes())

    async def _send(self, made: MadeDraft, attempt: int, hidden_from: int | None) -> None:
        """Send the round to the schedulers. Its slack is that at the time of arrival."""
        verify = self._state.verify(
            made.draft.tokens,
            made.request.round.acceptance,
            self._drafter_id,
            self._elapsed_ms() + self._control.times.one_way_ms,
            made.draft_ms,
            attempt,
            hidden_from,
            self._options.hidden_format,
            made.run_tokens,
            self._run_copies,
            [token.source for token in made.request.round.kept_tokens],
        )
        self._log.debug("round sent", draft=len(verify.draft), attempt=attempt)
        await self._link.send(verify)

    async def _result(self, timeout_s: float, waits_from_s: float) -> Result | Cancel | None:
        """Wait for the message that settles the round in flight, and apply it.

        Returns None after the timeout, or earlier if the round is to be sent again. waits_from_s: when the round was
        sent first.
        """
        self._waits_from_s = waits_from_s
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._inbox.get()
                    if message is None or isinstance(message, Cancel) or self._state.apply(message):
                        return message
        except TimeoutError:
            return None
        finally:
            self._waits_from_s = None

    def _learn(self, made: MadeDraft, result: Result, round_ms: float, *, resent: bool) -> None:
        """Let the controller learn from a settled round, and count it."""
        self._log.debug("round settled", status=result.status, accepted=result.accepted, tokens=len(result.tokens))
        metrics.ROUND_TIME.observe(round_ms / 1000)
        control, round_ = self._control, made.request.round
        # A conflict, a failure or a run that went on unseen shows neither whether the draft was right nor how long
        # verifying takes.
        committed = result.status is Status.COMMITTED and not result.run
        # A first round waits for its prompt. Beside a probe a round may take longer, since both may compute on the same
        # cores.
        if committed and not resent and not self._drafts.are_probed and result.round > 0:
            control.times.learn_round(result.trimmed_to, round_ms, result.verify_ms, result.queue_ms, result.new_tokens)
        verified, accepted = verified_counts(result) if committed else (0, 0)
        control.settle(round_, verified, accepted, bonus_matches(made.draft, result) if committed else None)
        metrics.count(round_, verified, accepted, made.draft, made.draft_ms)


def _draft_attributes(made: MadeDraft) -> tracing.Attributes:
    sources = Counter(token.source for token in made.request.round.kept_tokens)
    return {
        "wisp.drafted": len(made.draft.tokens),
        "wisp.draft_ms": made.draft_ms,
        "wisp.run_tokens": made.run_tokens,
        **{f"wisp.drafted.{source}": count for source, count in sources.items()},
    }


def _outcome_attributes(result: Result | Cancel, attempt: int) -> tracing.Attributes:
    if isinstance(result, Cancel):
        return {"wisp.status": "cancelled", "wisp.attempts": attempt + 1}
    return {
        "wisp.status": result.status,
        "wisp.attempts": attempt + 1,
        "wisp.drafted": result.drafted,
        "wisp.verified": result.trimmed_to,
        "wisp.accepted": result.accepted,
        "wisp.tokens": len(result.tokens),
        "wisp.batch": result.batch,
        "wisp.verifier": result.verifier,
    }


def _ms_since(started_s: float) -> float:
    return (time.monotonic() - started_s) * 1000
