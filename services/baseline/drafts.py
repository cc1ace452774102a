"""Drafts for the sessions of an engine in the same process: the drafter's own sources and controller, called for all
sessions of a step at once.

All sessions of a step wait for its drafts and for all that it verifies, so times are learned of steps and not of
sessions: a draft step serves all that draft, and a verified token costs each session of the step its time. The latter
is what the scheduler's price says elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.drafter.control import DraftRound, SessionControl
from services.drafter.core.session import verified_counts
from services.drafter.drafting import Drafting, SourceChoice
from services.drafter.sources import Draft, DraftRequest, DraftSource, States
from shared.engine import Engine
from shared.messages import Generate, Result
from shared.runtime import logging


@dataclass(frozen=True)
class Wish:
    """A session that may be drafted for, after its committed `tokens`."""

    session: str
    tokens: list[int]
    room: int
    """Most draft tokens that it can use."""


@dataclass
class _Session:
    generate: Generate
    choice: SourceChoice
    control: SessionControl
    round: DraftRound | None = None


class InProcessDrafts:
    """Drafting beside one engine. Not thread-safe."""

    def __init__(self, drafting: Drafting, engine: Engine) -> None:
        """engine: the target's, which keeps hidden states if some source reads them."""
        self._drafting = drafting
        self._engine = engine
        self._times = drafting.controller.times
        self._sessions: dict[str, _Session] = {}

    @property
    def longest(self) -> int:
        """Longest draft of a session."""
        return self._drafting.controller.draft_length

    def open(self, generate: Generate) -> None:
        """A session begins."""
        choice = self._drafting.choose(generate)
        control = self._drafting.controller.session(*choice.token_sources)
        self._sessions[generate.session] = _Session(generate, choice, control)

    def close(self, session: str) -> None:
        """It has ended; nothing happens if it is not known."""
        if (known := self._sessions.pop(session, None)) is not None:
            known.choice.source.close(session)

    def propose(self, wishes: Sequence[Wish]) -> dict[str, list[int]]:
        """The draft of each session."""
        by_source: dict[int, list[Wish]] = {}
        for wish in wishes:
            session = self._sessions[wish.session]
            session.round = session.control.begin(wish.room, session.generate.sampling.temperature)
            by_source.setdefault(id(session.choice.source), []).append(wish)
        drafts: dict[str, list[int]] = {}
        for some in by_source.values():
            for wish, draft in zip(some, self._ask(some), strict=True):
                drafts[wish.session] = draft.tokens
        return drafts

    def _ask(self, wishes: Sequence[Wish]) -> list[Draft]:
        """Drafts of sessions that have the same source."""
        source = self._sessions[wishes[0].session].choice.source
        started_s = time.perf_counter()
        try:
            drafts = source.propose([self._request(source, wish) for wish in wishes])
        except Exception:
            # Drafts only make it faster: without them the text is the same.
            logging.get().exception("draft source failed")
            drafts = [Draft() for _ in wishes]
        took_ms = (time.perf_counter() - started_s) * 1000
        for wish, draft in zip(wishes, drafts, strict=True):
            if (round_ := self._sessions[wish.session].round) is not None:
                round_.cut(len(draft.tokens))
        for name in {name for draft in drafts for name in draft.steps}:
            steps = max(draft.steps.get(name, 0) for draft in drafts)
            self._times.learn_draft(name, steps, took_ms, max(draft.computed for draft in drafts))
        return drafts

    def _request(self, source: DraftSource, wish: Wish) -> DraftRequest:
        session = self._sessions[wish.session]
        assert session.round is not None
        names = session.choice.token_sources
        states = None
        if session.choice.reads_hidden_states and session.round.wants("hidden"):
            start = max(0, min(source.seen(wish.session), len(wish.tokens) - 1) - 1)
            rows = self._engine.hidden(wish.session, start, len(wish.tokens) - 1)
            states = States(start, rows.float().numpy(force=True))
        return DraftRequest(wish.session, wish.tokens, session.generate.sampling, session.round, names, states)

    def settle(self, result: Result) -> None:
        """Learn from what became of a session's draft."""
        session = self._sessions.get(result.session)
        if session is not None and session.round is not None:
            session.control.settle(session.round, *verified_counts(result))
            session.round = None

    def learn_step(self, sessions: int, drafted: int, verify_ms: float) -> None:
        """Learn from a step of so many sessions that verified `drafted` tokens in all, and computed no prompt."""
        token_ms = self._times.token_ms - self._times.price_ms
        others_ms = token_ms * drafted * (sessions - 1) / sessions
        # What others' drafts add is a wait for the session, as a queue is.
        self._times.learn_round(drafted, verify_ms + others_ms, verify_ms, others_ms, drafted + 1)
        self._times.price_ms = (self._times.token_ms - self._times.price_ms) * (sessions - 1)
