"""Predicted outputs: the place of a growing output in the text that its client expects.

Clients send a prediction where the answer is mostly known, such as a file with a few edits. Where the output goes on as
predicted, the next tokens can be copied. Where it differs, the place is found again by the output's last tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

LONGEST = 4
"""Longest n-gram, in tokens, by which the place is found again."""
NEAR = 8
"""A single token gives the place only this far behind the difference."""

BEGINNING, FOUND, REPLACED = 8, 2, 2
"""Support of the first tokens of a prediction; support that a found place adds to its n-gram's length; support behind a
token that seems to replace the predicted one."""


class PredictedText:
    """A predicted text, by the positions of its n-grams. It does not change; many outputs may follow it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for end in range(1, len(self.tokens) + 1):
            for n in range(1, min(LONGEST, end) + 1):
                self._ends[tuple(self.tokens[end - n : end])].append(end)

    def place(self, recent: Sequence[int], expected: int) -> tuple[int, int] | None:
        """Return the position after the occurrence of the longest n-gram at the end of `recent`, and its length.

        Returns None if there is none. Of several occurrences the one nearest to `expected`, where the output was last,
        counts.
        """
        for n in range(min(LONGEST, len(recent)), 0, -1):
            ends = self._ends.get(tuple(recent[-n:]), ())
            if n == 1:
                ends = [end for end in ends if expected < end <= expected + NEAR]
            if ends:
                return min(ends, key=lambda end: (abs(end - expected), -end)), n
        return None


class PredictionFollower:
    """The place of one output in its predicted text."""

    def __init__(self, text: PredictedText) -> None:
        self._text = text
        self._expected = 0
        """Position in the prediction of the output's next token; of the difference while the place is lost."""
        self._differing = 0
        """Output tokens since the difference; 0 while the output goes on as predicted."""
        self._recent: list[int] = []
        self._matched = BEGINNING
        """Tokens in a row that were as predicted; more where that is likely to go on."""
        self.accepted = 0
        """Output tokens that were as predicted."""

    def copy(self) -> PredictionFollower:
        """Return a follower at the same place."""
        other = PredictionFollower(self._text)
        other._expected, other._differing, other._recent = self._expected, self._differing, self._recent.copy()
        other._matched, other.accepted = self._matched, self.accepted
        return other

    def push(self, token: int) -> None:
        """Go on with the output's next token."""
        self._recent = [*self._recent[1 - LONGEST :], token]
        tokens = self._text.tokens
        if not self._differing and self._expected < len(tokens) and tokens[self._expected] == token:
            self._expected += 1
            self._matched += 1
            self.accepted += 1
            return
        found = self._text.place(self._recent, self._expected)
        if found is None:
            self._differing += 1
            self._matched = 0
            return
        (self._expected, length), self._differing = found, 0
        self._matched = length + FOUND
        self.accepted += 1

    def continuation(self, length: int) -> list[int]:
        """Return the tokens that the output is expected to have next, at most `length`.

        A single differing token is assumed to replace the predicted one. After more of them, nothing is expected.
        """
        if self._differing > 1:
            return []
        start = self._expected + self._differing
        return self._text.tokens[start : start + max(0, length)]

    @property
    def support(self) -> int:
        """Matching tokens before a copy of the session's own text that is as likely to be right."""
        return max(self._matched, REPLACED)
