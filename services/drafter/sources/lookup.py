"""Prompt lookup: the tokens that followed the last occurrence of the session's latest n-gram, longest n first.

Costs next to nothing and needs no model; it pays where the output repeats its input or itself (summaries, edits, code).
"""

from __future__ import annotations

from collections.abc import Sequence

from services.drafter.sources.base import Draft, DraftRequest

LONGEST = 3
PRIOR_ACCEPTED, PRIOR_TRIED = 1.0, 2.0


class LookupDrafts:
    """N-gram lookup over each session's own tokens, indexed as they come."""

    name = "lookup"
    blocking = False

    def __init__(self) -> None:
        self._sessions: dict[str, _NgramIndex] = {}
        self._supports: dict[str, int] = {}
        self._accepted = [PRIOR_ACCEPTED] * (LONGEST + 1)
        self._tried = [PRIOR_TRIED] * (LONGEST + 1)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Copies of what followed the same n-gram before."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        index = self._sessions.setdefault(request.session, _NgramIndex())
        index.extend(request.tokens)
        tokens, support = index.continuation(request.tokens, request.length)
        self._supports[request.session] = support
        rate = self._accepted[support] / self._tried[support]
        return Draft(tokens, [rate] * len(tokens))

    def learn(self, session: str, drafted: int, accepted: int) -> None:
        """Keep the acceptance rate per n-gram length: tokens tried are those up to the first rejection."""
        support = self._supports.get(session, 0)
        if drafted:
            self._accepted[support] += accepted
            self._tried[support] += min(accepted + 1, drafted)

    def close(self, session: str) -> None:
        """Drop the session's index."""
        self._sessions.pop(session, None)
        self._supports.pop(session, None)


class _NgramIndex:
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

    def continuation(self, tokens: Sequence[int], length: int) -> tuple[list[int], int]:
        """What followed the longest known n-gram at the end, and its n; a copy that reaches the end goes on from its
        own tokens, so that a repeating pattern is continued."""
        if length <= 0:
            return [], 0
        for n in range(min(LONGEST, len(tokens)), 0, -1):
            end = self._ends.get(tuple(tokens[len(tokens) - n :]))
            if end is not None:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(length)], n
        return [], 0
