"""Losses and most probable tokens of a model over a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = tuple[list[float], list[int]]
"""The loss of each token after the first, in nats, and the most probable token at its position."""


def scores(logits: NDArray[np.floating], tokens: Sequence[int]) -> Scores:
    """Return the scores from the logits of all positions, (tokens, vocabulary)."""
    before = logits[:-1].astype(np.float64)
    largest = before.max(-1)
    total = largest + np.log(np.exp(before - largest[:, None]).sum(-1))
    losses = total - before[np.arange(len(before)), np.asarray(tokens[1:])]
    return losses.tolist(), before.argmax(-1).tolist()
