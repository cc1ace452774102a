"""Prompt lookup: the tokens that followed the last occurrence of the session's latest n-gram, longest n first.

Costs next to nothing and needs no model; it pays where the output repeats its input or itself (summaries, edits, code).
"""

from __future__ import annotations

from collections.abc import Sequence

from services.drafter.control import Guess, Step
from services.drafter.core.draft import Draft, DraftRequest, WithoutStates

NAME = "lookup"
LONGEST = 3


class LookupDrafts(WithoutStates):
    """N-gram lookup over each session's own tokens, indexed as they come."""

    blocking = False

    def __init__(self) -> None:
        self._sessions: dict[str, NgramIndex] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Copies of what followed the same n-gram before."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        index = self._sessions.setdefault(request.session, NgramIndex())
        index.extend(request.tokens)
        if not request.round.wants(NAME):
            return Draft()
        tokens, support = index.continuation(request.tokens, request.round.longest)
        kept: list[int] = []
        for token in tokens:
            step = request.round.add(Guess(NAME, support=support))
            if step is not Step.DROP:
                kept.append(token)
            if step is not Step.MORE:
                break
        return Draft(kept)

    def close(self, session: str) -> None:
        """Drop the session's index."""
        self._sessions.pop(session, None)


class NgramIndex:
    """Where each n-gram of a growing token sequence last ended, the sequence's own end excepted."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index every n-gram that ends before the last token."""
        if len(tokens) - 1 < self._indexed:
            self._ends.clear()
            self._indexed = 0
        for end in range(max(1, self._indexed + 1), len(tokens)):
            for n in range(1, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - n : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)

    def continuation(self, tokens: Sequence[int], length: int, drafted: Sequence[int] = ()) -> tuple[list[int], int]:
        """What followed the longest known n-gram at the end of `tokens` and `drafted`, and its n; a copy that reaches
        the end goes on from its own tokens, so that a repeating pattern is continued."""
        if length <= 0:
            return [], 0
        tail = [*tokens[-LONGEST:], *drafted]
        total = len(tokens) + len(drafted)
        for n in range(min(LONGEST, total), 0, -1):
            end = self._ends.get(tuple(tail[-n:]))
            if end is not None:
                period = total - end
                known = [*tokens[end:], *drafted]
                return [known[i % period] for i in range(length)], n
        return [], 0
