"""The drafts of one session: for its next round, made ahead for the one after it, and probes of sources."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from services.drafter import metrics
from services.drafter.control import DraftRound, SessionControl
from services.drafter.control.times import SPARE_COMPUTED
from services.drafter.core.draft import Draft, DraftAhead, DraftRequest, Prediction, States
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.session import DraftSession
from services.drafter.link import Link
from services.drafter.settings import ServingOptions
from services.drafter.sources.registry import HIDDEN
from services.drafter.worker import SourceWorker
from shared.messages import Result, Status

if TYPE_CHECKING:
    from shared.grammar.token_masks import DraftGrammar


@dataclass(frozen=True)
class MadeDraft:
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


class SessionDrafts:
    """Drafts for one session, on its link's hardware. Its state is given with each call."""

    def __init__(
        self,
        options: ServingOptions,
        worker: SourceWorker,
        sources: tuple[str, ...],
        control: SessionControl,
        hidden_rows: HiddenRows | None,
        link: Link,
    ) -> None:
        """Arguments as for `ServedSession`."""
        self._options = options
        self._worker = worker
        self._sources = sources
        self._control = control
        self._hidden_rows = hidden_rows
        self._link = link
        self.grammar: DraftGrammar | None = None
        """The grammar of the session's text; None if the text is free."""
        self._ahead: _AssumedDraft | None = None
        self._pending: _PendingAhead | None = None
        self._probes: dict[str, _RunningProbe] = {}
        """Running probes by source."""

    @property
    def are_probed(self) -> bool:
        """True if a probe is running."""
        return bool(self._probes)

    def close(self) -> None:
        """Stop the probes."""
        for probe in self._probes.values():
            probe.answer.cancel()

    async def draft(self, state: DraftSession) -> MadeDraft:
        """Return the round's draft: the one made ahead if its assumption holds, else a new one."""
        started = time.monotonic()
        control = self._control
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            kept = bool(ahead.draft.tokens) and ahead.tokens == state.tokens
            metrics.AHEAD.labels("kept" if kept else "dropped").inc()
            if kept:
                return MadeDraft(self._request(state, ahead.round, self._sources), ahead.draft, 0.0)
        self.settle_probes()
        if self.grammar is not None and self.grammar.mask(state.tokens).only is not None:
            # The verifier adds the tokens that the grammar forces: they need no draft.
            return self.empty(state)
        room = state.draft_room(self._options.draft_length)
        unready, behind = set(self._probes), set()
        if self._hidden_rows is not None and HIDDEN not in self._probes:
            missing_states, missing_tokens = self._missing(state, self._hidden_rows)
            if missing_states:
                unready.add(HIDDEN)
            elif missing_tokens > SPARE_COMPUTED:
                behind.add(HIDDEN)
        round_ = control.begin(room, state.generate.sampling.temperature, unready=unready, behind=behind)
        probes = round_.deferred_probes()
        request = self._request(state, round_, self._sources)
        if round_.longest == 0:
            draft_ms = self._link.draft_ms(Draft(), _ms_since(started))
            return MadeDraft(request, Draft(), draft_ms, probes, control.run_tokens(round_))
        draft, call_ms = await self._worker.draft(request)
        round_.cut(len(draft.tokens))
        self._link.learn_draft(control.times, draft, call_ms)
        draft_ms = self._link.draft_ms(draft, _ms_since(started))
        if draft.tokens and not round_.pays:
            round_.cut(0)
            draft = replace(draft, tokens=[], dropped=draft.tokens[0])
        return MadeDraft(request, draft, draft_ms, probes, control.run_tokens(round_))

    def empty(self, state: DraftSession) -> MadeDraft:
        """Return a round without a draft."""
        return MadeDraft(self._request(state, self._control.ahead(0, 0.0), ()), Draft(), 0.0)

    def _missing(self, state: DraftSession, hidden_rows: HiddenRows) -> tuple[bool, int]:
        """Return whether states are missing that the draft model needs now, and how many tokens it has to compute."""
        first = self._worker.source.starts_at(state.session_id, len(state.tokens))
        needed = max(0, first - 1)  # each token is computed with the state before it
        hidden_rows.need_from(needed)
        start, rows = hidden_rows.run(len(state.tokens))
        return not len(rows) or start > needed, len(state.tokens) - first

    def _request(self, state: DraftSession, round_: DraftRound, sources: tuple[str, ...]) -> DraftRequest:
        """Return the request to the source, with the hidden states that it has not read yet if it wants them."""
        states = None
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
            self.grammar,
        )

    def start_probes(self, state: DraftSession, made: MadeDraft) -> None:
        """Start the probes of a round that has been sent."""
        for round_ in made.probes:
            (source,) = round_.probed
            request = self._request(state, round_, (source,))
            # A copy of the tokens: the result may extend them while the source still drafts in its thread.
            request = replace(request, tokens=list(request.tokens))
            answer = asyncio.create_task(self._worker.draft(request))
            self._probes[source] = _RunningProbe(round_, len(request.tokens), answer, time.monotonic())

    def note_choice(self, result: Result) -> None:
        """Keep the target's token for the probes that drafted one at its position."""
        if result.status is Status.COMMITTED and result.tokens:
            for probe in self._probes.values():
                if 0 <= (at := probe.position - result.base_len) < len(result.tokens):
                    probe.chosen = result.tokens[at]

    def settle_probes(self) -> set[str]:
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

    def hidden_from(self, state: DraftSession) -> int | None:
        """Return the first position whose hidden state the round requests; None requests none."""
        if self._hidden_rows is None or self._control.rests(HIDDEN):
            return None
        return self._hidden_rows.wanted(len(state.tokens))

    def start_ahead(self, state: DraftSession, made: MadeDraft) -> None:
        """Start drafting for the round after this one, assuming that all of this draft is accepted."""
        control, draft = self._control, made.draft
        if not self._options.optimistic or self._probes or control.decodes_plainly:
            return
        room = state.draft_room(self._options.draft_length, assumed=len(draft.tokens) + 1)
        round_ = control.ahead(room, state.generate.sampling.temperature)
        if round_.longest == 0:
            return
        # A copy of the tokens: the result may extend them while the source still drafts in its thread.
        request = replace(made.request, tokens=list(made.request.tokens), round=round_, states=None)
        answer = self._worker.ahead(request, draft)
        if answer is not None:
            self._pending = _PendingAhead([*state.tokens, *draft.tokens], round_, answer, time.monotonic())

    def keep_ahead(self) -> None:
        """Keep the draft made ahead for the next round if it is ready; it is not worth waiting for."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not pending.answer.done():
            pending.answer.cancel()
            return
        made, _ = pending.answer.result()
        if made is not None and self._link.has_made(made.draft, _ms_since(pending.started_s)):
            self._ahead = _AssumedDraft([*pending.tokens, made.bonus], made.draft, pending.round)


def _ms_since(started_s: float) -> float:
    return (time.monotonic() - started_s) * 1000
