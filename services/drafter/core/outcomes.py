"""The likely outcomes of a round in flight: how many draft tokens are accepted, and which bonus token follows."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Outcome(NamedTuple):
    """An outcome with its chance."""

    chance: float
    accepted: int
    bonus: int


def likely_outcomes(
    draft: Sequence[int],
    acceptance: Sequence[float],
    choices: Sequence[Sequence[tuple[int, float]]],
    most: int,
) -> list[Outcome]:
    """Return the `most` likeliest outcomes, likeliest first.

    acceptance: of each draft token, given that its predecessors are accepted. choices: likely tokens with their shares
    after 0, 1, … draft tokens, so one entry more than there are draft tokens. A token that is rejected is no choice.
    """
    found: list[Outcome] = []
    survival = 1.0
    for accepted, likely in enumerate(choices):
        chance = survival
        rejected, share = None, 0.0
        if accepted < len(draft):
            chance *= 1 - acceptance[accepted]
            rejected = draft[accepted]
            share = sum(s for token, s in likely if token == rejected)
            survival *= acceptance[accepted]
        if share < 1:
            found += [Outcome(chance * s / (1 - share), accepted, token) for token, s in likely if token != rejected]
    return heapq.nlargest(most, found)
