"""Drafts by a small language model with another vocabulary than the target's.

The model reads the session's text in its own tokens. Its distribution is turned into one of the target's tokens
(`services.drafter.core.translation`), from which a token is chosen with the session's noise, as the target chooses.

A session's text can end where the draft model would go on with a longer token, because the target's tokens are shorter,
or a draft was cut. So the draft model computes the last place twice: behind its last token, and in place of it. Tokens
that begin with the text's last target tokens compete with what follows them, each with its probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.drafter.control import DraftDecision
from services.drafter.core.draft import Draft, DraftRequest
from services.drafter.core.own_tokens import OwnTokens
from services.drafter.core.translation import NEGLIGIBLE, Choices, Reading, ReadingChoices, Translation
from services.drafter.sources.model import ModelDrafts
from services.drafter.sources.registry import MODEL
from services.drafter.sources.statistics import draft_tokens
from shared.engine import Engine, Step
from shared.sampling.rules import Floats, LogitsProcessor
from shared.sampling.sampler import choose_in_rows


@dataclass
class _Drafting:
    """A session while it is drafted for."""

    request: DraftRequest
    processor: LogitsProcessor | None
    begun: tuple[int, ...]
    """The target's last tokens that a longer draft token may begin with."""
    length: int
    """Draft tokens of the session's text."""
    partial: bool
    """True if the text ends in a character that is not complete."""


class TranslatedDrafts(ModelDrafts):
    """A draft model on its own engine, whose tokens are read as the target's."""

    def __init__(self, engine: Engine, translation: Translation) -> None:
        super().__init__(engine)
        self._translation = translation
        self._texts: dict[str, OwnTokens] = {}

    def _draft(self, requests: Sequence[DraftRequest], drafts: list[Draft]) -> None:
        steps: dict[int, Step] = {}
        sessions: dict[int, _Drafting] = {}
        for i, request in enumerate(requests):
            if request.round.wants(MODEL) and (begun := self._begin(request)) is not None:
                sessions[i], steps[i] = begun
        first = True
        while steps:
            output = self._engine.forward(list(steps.values()))
            following: dict[int, Step] = {}
            for at, i in enumerate(steps):
                session, rows = sessions[i], _shares(output.logits[output.rows(at)].float().numpy(force=True))
                choices = self._first(session, rows) if first else self._translation.choices(rows[-1])
                reading = None
                if choices is not None:
                    drafts[i], reading = self._choose(session, choices, drafts[i])
                if reading is not None:
                    if reading.kept is not None:
                        self._engine.truncate(session.request.session_id, reading.kept)
                    following[i] = Step(session.request.session_id, [reading.token], rows=1)
            steps, first = following, False

    def _begin(self, request: DraftRequest) -> tuple[_Drafting, Step] | None:
        """Return the first step of a session; None if its text cannot be drafted for."""
        own = self._texts.setdefault(request.session_id, OwnTokens(self._translation))
        own.follow(request.tokens)
        tokens, partial = own.tokens, bool(own.partial)
        begun = own.begun()
        if not len(self._translation.opened(begun)):
            begun = ()
        if not tokens or len(tokens) + request.round.longest > self._engine.max_len or (partial and not begun):
            return None
        rows = 2 if begun and not partial and len(tokens) > 1 else 1
        held = min(self._engine.attach(request.session_id, tokens), len(tokens) - rows)
        self._engine.truncate(request.session_id, held)
        processor = LogitsProcessor.of(request.sampling, request.tokens, request.mask())
        session = _Drafting(request, processor, begun, len(tokens), partial)
        return session, Step(request.session_id, tokens[held:], rows=rows)

    def _first(self, session: _Drafting, rows: Floats) -> Choices | None:
        """Return the choices behind the session's text. rows: probabilities in the last place or the last two."""
        read = self._translation
        if session.partial:
            weights = rows[-1]
            least = NEGLIGIBLE * float(weights[read.opened(session.begun)].sum())
            readings = read.open_readings(session.begun, weights, least, session.length)
            return ReadingChoices(readings) if readings else None
        if len(rows) == 1:
            return read.choices(rows[0])
        last = session.length - 1
        token = self._texts[session.request.session_id].tokens[last]
        weights = rows[0] / max(float(rows[0][token]), 1e-30)
        return read.choices(rows[1], read.open_readings(session.begun, weights, NEGLIGIBLE, last))

    def _choose(self, session: _Drafting, choices: Choices, draft: Draft) -> tuple[Draft, Reading | None]:
        """Choose target tokens up to the end of a draft token; return the draft, and that token if it goes on."""
        request = session.request
        while True:
            if isinstance(choices, ReadingChoices) and not _allows_any(session.processor, choices):
                return draft, None
            position = len(request.tokens) + len(draft.tokens)
            [chosen] = choose_in_rows(
                choices.logits[None], [request.sampling], [position], choices.columns, [session.processor]
            )
            column = int(choices.columns.ids.searchsorted(chosen))
            [token] = draft_tokens(MODEL, choices.with_rest[None], [column])
            draft.steps[MODEL] = draft.steps.get(MODEL, 0) + 1
            decision = request.round.add(token)
            if decision is DraftDecision.DROP:
                return replace(draft, dropped=chosen), None
            draft.tokens.append(chosen)
            if decision is DraftDecision.LAST:
                return draft, None
            if session.processor is not None:
                session.processor.push(chosen)
            after = choices.after(chosen)
            if after is None or isinstance(after, Reading):
                return draft, after
            choices = after

    def close(self, session_id: str) -> None:
        """Free the session's cache, and forget its text."""
        super().close(session_id)
        self._texts.pop(session_id, None)


def _allows_any(processor: LogitsProcessor | None, choices: Choices) -> bool:
    """Return whether a session's rules allow one of the few tokens that go on within a draft token."""
    if processor is None:
        return True
    return bool(np.isfinite(processor.apply(choices.logits, choices.columns.ids)).any())


def _shares(logits: Floats) -> Floats:
    """Return the probabilities of rows of logits."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares
