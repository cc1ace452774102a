"""Drafts by prompt lookup (`shared.lookup`), and from the output that the session's client expects."""

from __future__ import annotations

from collections.abc import Sequence

from services.drafter.control import DraftDecision, DraftToken
from services.drafter.core.draft import Draft, DraftRequest, Prediction, WithoutStates
from shared.lookup import LONGEST_MATCH, LookupText
from shared.prediction import PredictedText, PredictionFollower

LOOKUP = "lookup"


class LookupDrafts(WithoutStates):
    """Copies of each session's own tokens."""

    blocking = False

    def __init__(self) -> None:
        self._texts: dict[str, CopyText] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return copies of the tokens that followed where the session's end has occurred before."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        if not request.round.wants(LOOKUP):
            return Draft()
        if (text := self._texts.get(request.session_id)) is None:
            text = self._texts[request.session_id] = CopyText(request.prediction)
        text.extend(request.tokens)
        tokens, matched = text.continuation(request.round.longest)
        kept: list[int] = []
        mask = request.mask()
        for i, token in enumerate(tokens):
            if mask is not None:
                if not mask.allows(token):
                    break
                mask.push(token)
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


class CopyText:
    """The tokens that a session may copy: from its prediction where the output goes on as predicted, else its own."""

    def __init__(self, prediction: Prediction | None = None) -> None:
        self._own = LookupText()
        self._start = 0 if prediction is None else prediction.start
        self._predicted = None if prediction is None else PredictedText(prediction.tokens)
        self._follower = None if self._predicted is None else PredictionFollower(self._predicted)
        self._followed = 0
        """Output tokens that the follower has taken."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the tokens of the whole session that are new. A session that became shorter is taken anew."""
        self._own.extend(tokens)
        if self._predicted is None or self._follower is None:
            return
        if len(tokens) - self._start < self._followed:
            self._follower, self._followed = PredictionFollower(self._predicted), 0
        for token in tokens[self._start + self._followed :]:
            self._follower.push(token)
            self._followed += 1

    def continuation(self, length: int, drafted: Sequence[int] = ()) -> tuple[list[int], int]:
        """Return the tokens to copy after the session and `drafted`, and how many tokens before them match."""
        if (follower := self._follower) is not None and length > 0:
            if drafted:
                follower = follower.copy()
                for token in drafted:
                    follower.push(token)
            if copied := follower.continuation(length):
                return copied, min(follower.support, LONGEST_MATCH)
        return self._own.continuation(length, drafted)
