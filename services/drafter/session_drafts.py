"""The drafts of one session: for its next round, prepared ones for the round after it, and probes of sources."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from services.drafter import metrics
from services.drafter.control import DraftRound, SessionControl
from services.drafter.control.times import SPARE_COMPUTED
from services.drafter.core.draft import AheadRequest, Draft, DraftRequest, Prediction, PreparedDraft, States
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
class _PreparedDrafts:
    """Drafts for the next round, by the tokens that the round before it brings after `tokens`."""

    tokens: list[int]
    drafts: list[PreparedDraft]

    def fitting(self, tokens: list[int]) -> PreparedDraft | None:
        """Return the draft that follows a session's tokens."""
        return next((one for one in self.drafts if [*self.tokens, *one.tokens] == tokens), None)


@dataclass(frozen=True)
class _Preparation:
    """Drafts in preparation, while the round before them is in flight."""

    tokens: list[int]
    """The session's tokens when that round was sent."""
    answer: asyncio.Future[tuple[list[PreparedDraft], float]]
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
        self._prepared: _PreparedDrafts | None = None
        self._preparation: _Preparation | None = None
        self._most = options.prepared_outcomes
        """Outcomes to prepare: fewer where rounds end before so many are."""
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
        """Return the round's draft: one that was prepared for these tokens, else a new one."""
        started = time.monotonic()
        control = self._control
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            fitting = prepared.fitting(state.tokens)
            metrics.AHEAD.labels("dropped" if fitting is None else "kept").inc()
            if fitting is not None:
                return MadeDraft(self._request(state, fitting.round, self._sources), fitting.draft, 0.0)
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
        states = self._states(state) if round_.wants(HIDDEN) else None
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

    def _states(self, state: DraftSession) -> States | None:
        """Return the hidden states that the source has not read yet; None if there are none."""
        if self._hidden_rows is None:
            return None
        start, rows = self._hidden_rows.run(len(state.tokens))
        return States(start, rows.copy()) if len(rows) else None

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
        """Start to prepare drafts for the likely outcomes of a round that has been sent.

        Sessions with a grammar get none: most of their outcomes are decided by it.
        """
        control, draft, longest = self._control, made.draft, self._options.draft_length
        if not self._most or self._probes or self.grammar is not None or control.decodes_plainly:
            return
        temperature = state.generate.sampling.temperature
        rooms = [state.draft_room(longest, assumed=count + 1) for count in range(len(draft.tokens) + 1)]
        if control.ahead(rooms[0], temperature).longest == 0:
            return
        # A copy of the tokens: the result may extend them while the source still drafts in its thread.
        request = replace(made.request, tokens=list(state.tokens), states=self._states(state))

        def begin(count: int) -> DraftRound:
            return control.ahead(rooms[count - 1], temperature, in_flight=True)

        asked = AheadRequest(request, draft, begin, self._most)
        if (answer := self._worker.ahead(asked)) is not None:
            self._preparation = _Preparation(list(state.tokens), answer, time.monotonic())

    def keep_ahead(self) -> None:
        """Keep the drafts prepared for the next round if they are ready; they are not worth waiting for."""
        preparation, self._preparation = self._preparation, None
        if preparation is None:
            return
        if not preparation.answer.done():
            preparation.answer.cancel()
            self._most = max(1, self._most // 2)
            return
        drafts, _ = preparation.answer.result()
        made = self._link.made_ahead([one.draft for one in drafts], _ms_since(preparation.started_s))
        self._most = min(self._options.prepared_outcomes, self._most + 1)
        if drafts := drafts[:made]:
            self._prepared = _PreparedDrafts(preparation.tokens, drafts)


def _ms_since(started_s: float) -> float:
    return (time.monotonic() - started_s) * 1000
