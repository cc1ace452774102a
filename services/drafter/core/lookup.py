"""Prompt lookup: copy the tokens that followed the last occurrence of the session's latest n-gram, longest n first.

Lookup costs next to nothing and needs no model. It pays where the output repeats its input or itself (summaries, edits,
code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.drafter.control import DraftDecision, DraftToken
from services.drafter.core.draft import Draft, DraftRequest, WithoutStates

LOOKUP = "lookup"
LONGEST = 3
"""Longest n-gram, in tokens."""


class LookupDrafts(WithoutStates):
    """N-gram lookup over each session's own tokens, indexed as they are committed."""

    blocking = False

    def __init__(self) -> None:
        self._indices: dict[str, NgramIndex] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return copies of the tokens that followed the same n-gram before."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        index = self._indices.setdefault(request.session_id, NgramIndex())
        index.extend(request.tokens)
        if not request.round.wants(LOOKUP):
            return Draft()
        tokens, support = index.continuation(request.tokens, request.round.longest)
        kept: list[int] = []
        for token in tokens:
            decision = request.round.add(DraftToken(LOOKUP, support=support))
            if decision is DraftDecision.DROP:
                return Draft(kept, dropped=token)
            kept.append(token)
            if decision is DraftDecision.LAST:
                break
        return Draft(kept)

    def close(self, session_id: str) -> None:
        """Drop the session's index."""
        self._indices.pop(session_id, None)


class NgramIndex:
    """The last position of each n-gram in a growing token sequence, except at the sequence's own end."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index every n-gram that ends before the last token. A sequence that became shorter is indexed anew."""
        if len(tokens) - 1 < self._indexed:
            self._ends.clear()
            self._indexed = 0
        for end in range(max(1, self._indexed + 1), len(tokens)):
            for n in range(1, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - n : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)

    def continuation(self, tokens: Sequence[int], length: int, drafted: Sequence[int] = ()) -> tuple[list[int], int]:
        """Return the tokens that followed the longest known n-gram at the end of `tokens` and `drafted`, and its n.

        A copy that reaches the end continues with its own tokens, so that a repeating pattern goes on.
        """
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


@dataclass(frozen=True)
class UnsentCopy:
    """A token that lookup would have drafted, and whether it equals the committed one."""

    token: DraftToken
    position: int
    """Its place in the draft. The tokens before it were correct."""
    correct: bool


class UnsentCopies:
    """The drafts that lookup would have made in a session while none were sent.

    They show at no cost how often lookup is right in this text.
    """

    def __init__(self, length: int) -> None:
        """length: of the longest draft."""
        self._length = length
        self._index = NgramIndex()
        self._copied: list[int] = []
        """The rest of the current draft."""
        self._support = self._position = self._next = 0

    def follow(self, tokens: Sequence[int], start: int) -> list[UnsentCopy]:
        """Return the copies at the positions from `start` on, which were committed since the last call."""
        if start != self._next:
            self._copied = []
        found = []
        for at in range(start, len(tokens)):
            if not self._copied:
                before = tokens[:at]
                self._index.extend(before)
                self._copied, self._support = self._index.continuation(before, self._length)
                self._position = 0
            if self._copied:
                correct = self._copied.pop(0) == tokens[at]
                found.append(UnsentCopy(DraftToken(LOOKUP, support=self._support), self._position, correct))
                self._position += 1
                if not correct:
                    self._copied = []
        self._next = len(tokens)
        return found
