"""Drafts for the sessions of an engine in the same process.

The drafter's own sources and controller draft for all sessions of a step at once. All sessions of a step wait for its
drafts and its verified tokens, so times are learned per step: a draft step serves all drafting sessions, and a verified
token costs each session of the step its time. In the suite, the scheduler's price represents this cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.drafter.control import DraftRound, SessionControl
from services.drafter.core.session import bonus_matches, verified_counts
from services.drafter.drafting import Drafting, SourceChoice
from services.drafter.sources import Draft, DraftRequest, DraftSource, Prediction, States
from services.drafter.sources.registry import HIDDEN
from shared.messages import Generate, Result
from shared.models.bfloat16 import to_floats
from shared.runtime import logging

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine
    from shared.grammar.token_masks import DraftGrammar


@dataclass(frozen=True)
class DraftSlot:
    """A session to draft for, with its committed `tokens`."""

    session_id: str
    tokens: list[int]
    room: int
    """Most draft tokens that the session can use."""


@dataclass
class _DraftedSession:
    generate: Generate
    choice: SourceChoice
    control: SessionControl
    grammar: DraftGrammar | None
    round: DraftRound | None = None
    draft: Draft = field(default_factory=Draft)


class InProcessDrafts:
    """Drafting beside one engine. Not thread-safe."""

    def __init__(self, drafting: Drafting, engine: TargetEngine) -> None:
        """`engine` is the target's; it keeps hidden states if a source reads them."""
        self._drafting = drafting
        self._engine = engine
        self._times = drafting.controller.times
        self._sessions: dict[str, _DraftedSession] = {}

    @property
    def longest(self) -> int:
        """Longest draft of a session."""
        return self._drafting.controller.draft_length

    def open(self, generate: Generate) -> None:
        """Add a session."""
        choice = self._drafting.choose(generate)
        control = self._drafting.controller.session(*choice.token_sources)
        grammar = self._drafting.grammar(generate)
        self._sessions[generate.session] = _DraftedSession(generate, choice, control, grammar)

    def close(self, session_id: str) -> None:
        """Remove a session; nothing happens if it is unknown."""
        if (session := self._sessions.pop(session_id, None)) is not None:
            session.choice.source.close(session_id)
            self._drafting.close(session_id)

    def propose(self, slots: Sequence[DraftSlot]) -> dict[str, list[int]]:
        """Return the draft of each session."""
        by_source: dict[int, list[DraftSlot]] = {}
        for slot in slots:
            session = self._sessions[slot.session_id]
            forced = session.grammar is not None and session.grammar.mask(slot.tokens).only is not None
            # The verifier adds the tokens that the grammar forces, so a draft here would be wasted.
            room = 0 if forced else slot.room
            session.round = session.control.begin(room, session.generate.sampling.temperature)
            by_source.setdefault(id(session.choice.source), []).append(slot)
        drafts: dict[str, list[int]] = {}
        for same_source in by_source.values():
            for slot, draft in zip(same_source, self._ask(same_source), strict=True):
                drafts[slot.session_id] = draft.tokens
        return drafts

    def _ask(self, slots: Sequence[DraftSlot]) -> list[Draft]:
        """Return the drafts of sessions with the same source."""
        source = self._sessions[slots[0].session_id].choice.source
        started_s = time.perf_counter()
        try:
            drafts = source.propose([self._request(source, slot) for slot in slots])
        except Exception:
            # Drafts only save time: without them the text is the same.
            logging.get().exception("draft source failed")
            drafts = [Draft() for _ in slots]
        took_ms = (time.perf_counter() - started_s) * 1000
        for slot, draft in zip(slots, drafts, strict=True):
            if (round_ := self._sessions[slot.session_id].round) is not None:
                round_.cut(len(draft.tokens))
            self._sessions[slot.session_id].draft = draft
        for name in {name for draft in drafts for name in draft.steps}:
            steps = max(draft.steps.get(name, 0) for draft in drafts)
            self._times.learn_draft(name, steps, took_ms, max(draft.computed for draft in drafts))
        return drafts

    def _request(self, source: DraftSource, slot: DraftSlot) -> DraftRequest:
        session = self._sessions[slot.session_id]
        assert session.round is not None
        names = session.choice.token_sources
        states = None
        if session.choice.reads_hidden_states and session.round.wants(HIDDEN):
            start = max(0, source.starts_at(slot.session_id, len(slot.tokens)) - 1)
            bits = self._engine.hidden_bits(slot.session_id, start, len(slot.tokens) - 1)
            states = States(start, to_floats(bits))
        generate = session.generate
        prompt_len = len(generate.prompt)
        prediction = Prediction(prompt_len, generate.prediction) if generate.prediction else None
        return DraftRequest(
            slot.session_id,
            slot.tokens,
            generate.sampling,
            session.round,
            names,
            states,
            prompt_len,
            prediction,
            session.grammar,
        )

    def settle(self, result: Result) -> None:
        """Learn from a session's result."""
        session = self._sessions.get(result.session)
        if session is not None and session.round is not None:
            session.control.settle(session.round, *verified_counts(result), bonus_matches(session.draft, result))
            session.round, session.draft = None, Draft()

    def learn_step(self, sessions: int, drafted: int, verify_ms: float) -> None:
        """Learn from a step without prompts in which `sessions` sessions verified `drafted` draft tokens in all."""
        others_ms = self._verified_ms(drafted) * (sessions - 1) / sessions
        # For a session, the time of other sessions' drafts is queueing time.
        self._times.learn_round(drafted, verify_ms + others_ms, verify_ms, others_ms, drafted + 1)
        self._times.price_ms = self._verified_ms(1) * (sessions - 1)

    def _verified_ms(self, count: int) -> float:
        """Return the time that verifying `count` draft tokens adds to a step."""
        return self._times.added_ms(count) - self._times.price_ms * count
