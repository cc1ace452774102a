"""One session in its drafter, from its request to its end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from services.drafter import metrics
from services.drafter.control import DraftRound, SessionControl
from services.drafter.control.times import SPARE_COMPUTED
from services.drafter.core.draft import Draft, DraftAhead, DraftRequest, Prediction, States
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.session import DraftSession, RoundTimers, bonus_matches, verified_counts
from services.drafter.link import Deliver, Link
from services.drafter.settings import ServingOptions
from services.drafter.sources.registry import HIDDEN
from services.drafter.worker import SourceWorker
from shared.errors import MessageError
from shared.messages import Cancel, Generate, HiddenStates, Result, Status
from shared.runtime import logging, tracing
from shared.runtime.tracing import NO_SPAN
from shared.state.store import Session

if TYPE_CHECKING:
    from shared.grammar.masks import DraftGrammar


_UNTRACED: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class _MadeDraft:
    """A round's draft, ready to be sent."""

    request: DraftRequest
    draft: Draft
    draft_ms: float
    """Time that the draft took on the session's hardware."""
    probes: list[DraftRound] = field(default_factory=list)
    """Probes to draft while the round is in flight."""
    run_tokens: int = 0
    """Tokens that are left to the verifier after the round."""


@dataclass(frozen=True)
class _AssumedDraft:
    """A draft made ahead: for the next round, if the session's tokens are then `tokens`."""

    tokens: list[int]
    draft: Draft
    round: DraftRound


@dataclass(frozen=True)
class _PendingAhead:
    """A draft being made ahead, while the round before it is in flight."""

    tokens: list[int]
    """The session's tokens if all of that round's draft is accepted, without the bonus token."""
    round: DraftRound
    answer: asyncio.Future[tuple[DraftAhead | None, float]]
    started_s: float


@dataclass
class _RunningProbe:
    """A probe, drafted while rounds are in flight."""

    round: DraftRound
    position: int
    """Position of the token that it drafts."""
    answer: asyncio.Task[tuple[Draft, float]]
    started_s: float
    chosen: int | None = None
    """The target's token at that position; None until it is committed."""


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
    ) -> None:
        """sources: names of the sources that may propose tokens. hidden_rows: None if none of them reads hidden states.
        run_copies: most draft tokens of a step by prompt lookup in its runs.
        open_link: opens the session's link."""
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
        self._sources = sources
        self._control = control
        self._hidden_rows = hidden_rows
        self._run_copies = run_copies
        self._link = open_link(self._deliver)
        self._grammar: DraftGrammar | None = None
        self._inbox: asyncio.Queue[Result | Cancel | None] = asyncio.Queue()
        """Received messages; None asks to send the round in flight again."""
        self._waits_from_s: float | None = None
        """When the round in flight was sent first; None if none is in flight."""
        self._ahead: _AssumedDraft | None = None
        self._probes: dict[str, _RunningProbe] = {}
        """Running probes by source."""
        self._span = tracing.current()
        """The completion's span, in its gateway."""
        self._round_span = NO_SPAN
        self._log = logging.get()

    def follow(self, grammar: DraftGrammar | None) -> None:
        """Draft by the grammar of the session's text from here on; None if the text is free."""
        self._grammar = grammar

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
            for probe in self._probes.values():
                probe.answer.cancel()
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
            made = await self._draft()
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
        ahead = None
        hidden_from = self._hidden_from()
        first_sent = time.monotonic()
        while True:
            sent = time.monotonic()
            await self._send(made, attempt, hidden_from)
            if attempt == 0:
                self._start_probes(made)
                ahead = self._draft_ahead(made)
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
        self._note_choice(result)
        if self._hidden_rows is not None and len(self._state.tokens) < base_len:
            self._hidden_rows.truncate(len(self._state.tokens))
        self._ahead = None if ahead is None else self._finished(ahead)
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
                await self._send(_MadeDraft(self._request(self._control.ahead(0, 0.0), ()), Draft(), 0.0), 0, None)
            known = len(state.tokens)
            result = await self._result(self._timers.of(state).timeout_ms(0) / 1000, time.monotonic())
            if isinstance(result, Cancel):
                return False
            if result is None:
                self._log.info("run is late, asking for its tokens")
                state.run_left = 0
                return True
            self._note_choice(result)
            self._control.learn_run(len(state.tokens) - known, result.verify_ms)
        return True

    def _is_tempted(self) -> bool:
        """Return whether a probe has just shown that its source is worth halting the run."""
        round_ = self._control.ahead(
            self._state.draft_room(self._options.draft_length), self._state.generate.sampling.temperature
        )
        return any(round_.wants(source) for source in self._settle_probes())

    async def _draft(self) -> _MadeDraft:
        """Return the round's draft: the one made ahead if its assumption holds, else a new one."""
        started = time.monotonic()
        state, control = self._state, self._control
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            kept = bool(ahead.draft.tokens) and ahead.tokens == state.tokens
            metrics.AHEAD.labels("kept" if kept else "dropped").inc()
            if kept:
                return _MadeDraft(self._request(ahead.round, self._sources), ahead.draft, 0.0)
        self._settle_probes()
        if self._grammar is not None and self._grammar.mask(state.tokens).only is not None:
            # The verifier adds the tokens that the grammar forces: they need no draft.
            return _MadeDraft(self._request(control.ahead(0, 0.0), ()), Draft(), 0.0)
        room = state.draft_room(self._options.draft_length)
        unready, behind = set(self._probes), set()
        if self._hidden_rows is not None and HIDDEN not in self._probes:
            missing_states, missing_tokens = self._missing(self._hidden_rows)
            if missing_states:
                unready.add(HIDDEN)
            elif missing_tokens > SPARE_COMPUTED:
                behind.add(HIDDEN)
        round_ = control.begin(room, state.generate.sampling.temperature, unready=unready, behind=behind)
        probes = round_.deferred_probes()
        request = self._request(round_, self._sources)
        if round_.longest == 0:
            draft_ms = self._link.draft_ms(Draft(), _ms_since(started))
            return _MadeDraft(request, Draft(), draft_ms, probes, control.run_tokens(round_))
        draft, call_ms = await self._worker.draft(request)
        round_.cut(len(draft.tokens))
        self._link.learn_draft(control.times, draft, call_ms)
        draft_ms = self._link.draft_ms(draft, _ms_since(started))
        if draft.tokens and not round_.pays:
            round_.cut(0)
            draft = replace(draft, tokens=[], dropped=draft.tokens[0])
        return _MadeDraft(request, draft, draft_ms, probes, control.run_tokens(round_))

    def _missing(self, hidden_rows: HiddenRows) -> tuple[bool, int]:
        """Return whether states are missing that the draft model needs now, and how many tokens it has to compute."""
        state = self._state
        first = self._worker.source.starts_at(state.session_id, len(state.tokens))
        needed = max(0, first - 1)  # each token is computed with the state before it
        hidden_rows.need_from(needed)
        start, rows = hidden_rows.run(len(state.tokens))
        return not len(rows) or start > needed, len(state.tokens) - first

    def _request(self, round_: DraftRound, sources: tuple[str, ...]) -> DraftRequest:
        """Return the request to the source, with the hidden states that it has not read yet if it wants them."""
        state, states = self._state, None
        if self._hidden_rows is not None and round_.wants(HIDDEN):
            start, rows = self._hidden_rows.run(len(state.tokens))
            states = States(start, rows.copy()) if len(rows) else None
        generate = state.generate
        prompt_len = len(generate.prompt)
        prediction = Prediction(prompt_len, generate.prediction) if generate.prediction else None
        return DraftRequest(
            state.session_id,
            state.tokens,
            generate.sampling,
            round_,
            sources,
            states,
            prompt_len,
            prediction,
            self._grammar,
        )

    def _start_probes(self, made: _MadeDraft) -> None:
        """Start the probes of a round that has been sent."""
        for round_ in made.probes:
            (source,) = round_.probed
            request = self._request(round_, (source,))
            # A copy of the tokens: the result may extend them while the source still drafts in its thread.
            request = replace(request, tokens=list(request.tokens))
            answer = asyncio.create_task(self._worker.draft(request))
            self._probes[source] = _RunningProbe(round_, len(request.tokens), answer, time.monotonic())

    def _note_choice(self, result: Result) -> None:
        """Keep the target's token for the probes that drafted one at its position."""
        if result.status is Status.COMMITTED and result.tokens:
            for probe in self._probes.values():
                if 0 <= (at := probe.position - result.base_len) < len(result.tokens):
                    probe.chosen = result.tokens[at]

    def _settle_probes(self) -> set[str]:
        """Learn from the probes that the session's hardware has made by now; return their sources."""
        control, settled = self._control, set()
        for source, probe in list(self._probes.items()):
            if not probe.answer.done():
                continue
            draft, call_ms = probe.answer.result()
            elapsed_ms = _ms_since(probe.started_s)
            if elapsed_ms < self._link.draft_ms(draft, min(call_ms, elapsed_ms)):
                continue
            del self._probes[source]
            self._link.learn_probe(control.times, draft, call_ms)
            known = draft.dropped is not None and probe.chosen is not None
            control.settle(probe.round, 0, 0, draft.dropped == probe.chosen if known else None)
            metrics.STEPS.inc(sum(draft.steps.values()))
            settled.add(source)
        return settled

    def _hidden_from(self) -> int | None:
        """Return the first position whose hidden state the round requests; None requests none."""
        if self._hidden_rows is None or self._control.rests(HIDDEN):
            return None
        return self._hidden_rows.wanted(len(self._state.tokens))

    async def _send(self, made: _MadeDraft, attempt: int, hidden_from: int | None) -> None:
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

    def _learn(self, made: _MadeDraft, result: Result, round_ms: float, *, resent: bool) -> None:
        """Let the controller learn from a settled round, and count it."""
        self._log.debug("round settled", status=result.status, accepted=result.accepted, tokens=len(result.tokens))
        metrics.ROUND_TIME.observe(round_ms / 1000)
        control, round_ = self._control, made.request.round
        # A conflict, a failure or a run that went on unseen shows neither whether the draft was right nor how long
        # verifying takes.
        committed = result.status is Status.COMMITTED and not result.run
        # A first round waits for its prompt. Beside a probe a round may take longer, since both may compute on the same
        # cores.
        if committed and not resent and not self._probes and result.round > 0:
            control.times.learn_round(result.trimmed_to, round_ms, result.verify_ms, result.queue_ms, result.new_tokens)
        verified, accepted = verified_counts(result) if committed else (0, 0)
        control.settle(round_, verified, accepted, bonus_matches(made.draft, result) if committed else None)
        metrics.count(round_, verified, accepted, made.draft)

    def _draft_ahead(self, made: _MadeDraft) -> _PendingAhead | None:
        """Start drafting for the round after this one, assuming that all of this draft is accepted."""
        state, control, draft = self._state, self._control, made.draft
        if not self._options.optimistic or self._probes or control.decodes_plainly:
            return None
        room = state.draft_room(self._options.draft_length, assumed=len(draft.tokens) + 1)
        round_ = control.ahead(room, state.generate.sampling.temperature)
        if round_.longest == 0:
            return None
        # A copy of the tokens: the result may extend them while the source still drafts in its thread.
        request = replace(made.request, tokens=list(made.request.tokens), round=round_, states=None)
        answer = self._worker.ahead(request, draft)
        if answer is None:
            return None
        return _PendingAhead([*state.tokens, *draft.tokens], round_, answer, time.monotonic())

    def _finished(self, ahead: _PendingAhead) -> _AssumedDraft | None:
        """Return the draft made ahead if it is ready; it is not worth waiting for."""
        if not ahead.answer.done():
            ahead.answer.cancel()
            return None
        made, _ = ahead.answer.result()
        if made is None or not self._link.has_made(made.draft, _ms_since(ahead.started_s)):
            return None
        return _AssumedDraft([*ahead.tokens, made.bonus], made.draft, ahead.round)


def _draft_attributes(made: _MadeDraft) -> tracing.Attributes:
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
