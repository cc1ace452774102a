"""Comparison of a draft's weights on texts that they have not learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.01
"""Least gain that counts, in accepted tokens per draft."""


@dataclass(frozen=True)
class TextScore:
    """Drafts at every position of one text."""

    drafts: int
    first: int
    """Drafts whose first token is accepted."""
    accepted: int
    """Accepted tokens of all drafts."""


@dataclass(frozen=True)
class HeldBackScore:
    """The score of some weights on the held-back texts, one entry a text."""

    texts: tuple[TextScore, ...]

    @property
    def drafts(self) -> int:
        """Number of drafts."""
        return sum(text.drafts for text in self.texts)

    @property
    def acceptance(self) -> float:
        """Share of drafts whose first token is accepted."""
        return sum(text.first for text in self.texts) / max(1, self.drafts)

    @property
    def accepted(self) -> float:
        """Mean number of accepted tokens of a draft."""
        return sum(text.accepted for text in self.texts) / max(1, self.drafts)

    def beats(self, other: HeldBackScore) -> bool:
        """Return whether these weights are better than others on the same texts, beyond chance.

        The gain has to exceed `MARGIN` and its standard error. Positions of one text are alike, so the error is that of
        a ratio over texts.
        """
        gain = self.accepted - other.accepted
        return gain > max(MARGIN, _standard_error(self.texts, other.texts))


def _standard_error(ours: Sequence[TextScore], theirs: Sequence[TextScore]) -> float:
    """Return the standard error of the difference of the accepted tokens of a draft."""
    drafts = sum(text.drafts for text in ours)
    count = len(ours)
    if count < 2 or not drafts:
        return math.inf
    differences = [a.accepted - b.accepted for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / drafts
    squares = sum((difference - mean * text.drafts) ** 2 for difference, text in zip(differences, ours, strict=True))
    return math.sqrt(squares * count / (count - 1)) / drafts
