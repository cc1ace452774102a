"""Drafts by prompt lookup (`shared.lookup`)."""

from __future__ import annotations

from collections.abc import Sequence

from services.drafter.control import DraftDecision, DraftToken
from services.drafter.core.draft import Draft, DraftRequest, WithoutStates
from shared.lookup import LookupText

LOOKUP = "lookup"


class LookupDrafts(WithoutStates):
    """Copies of each session's own tokens."""

    blocking = False

    def __init__(self) -> None:
        self._texts: dict[str, LookupText] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return copies of the tokens that followed where the session's end has occurred before."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        if not request.round.wants(LOOKUP):
            return Draft()
        text = self._texts.setdefault(request.session_id, LookupText())
        text.extend(request.tokens)
        tokens, matched = text.continuation(request.round.longest)
        kept: list[int] = []
        for i, token in enumerate(tokens):
            decision = request.round.add(DraftToken(LOOKUP, support=matched + i))
            if decision is DraftDecision.DROP:
                return Draft(kept, dropped=token)
            kept.append(token)
            if decision is DraftDecision.LAST:
                break
        return Draft(kept)

    def close(self, session_id: str) -> None:
        """Drop the session's text."""
        self._texts.pop(session_id, None)
