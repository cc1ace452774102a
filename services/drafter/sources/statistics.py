"""Statistics of drafted tokens, from the logits that they were chosen from. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.drafter.control import DraftToken

Statistics = tuple[float, float, float, float]
"""Confidence, entropy, margin and spread."""


def draft_tokens(source: str, logits: NDArray[np.float32], columns: Sequence[int]) -> list[DraftToken]:
    """Return the statistics of chosen tokens.

    logits: (rows, tokens). columns: the column of the token chosen in each row.
    """
    return [DraftToken(source, *row_statistics(row, column)) for row, column in zip(logits, columns, strict=True)]


def row_statistics(x: NDArray[np.float32], column: int) -> Statistics:
    """Return the statistics of the token in `column`, given its row of logits."""
    top, count = int(x.argmax()), len(x)
    shifted = x - x[top]
    weights = np.exp(shifted)
    total = float(weights.sum())
    # With shares p = weights / total, log total - sum p x is the entropy without a logarithm of every share.
    entropy = math.log(total) - float(weights @ shifted) / total
    confidence = float(weights[column]) / total
    weights[top] = 0
    margin = (1 - float(weights.max())) / total if count > 1 else 0.0
    centred = x - x.sum() / np.float32(count)
    spread = math.sqrt(float(centred @ centred) / max(count - 1, 1))
    return confidence, entropy, margin, spread
