"""Log-probabilities from logits: the target's own distribution, before temperature and all other options.

They are computed in float64 from one row at a time and rounded to float32, so they depend on no batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shared.messages.logprobs import TokenLogprob
from shared.sampling.rules import Floats
from shared.sampling.sampler import largest

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's value."""


def logprobs_of(logits: Floats, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of each row's token, its rank, and the `top` most probable tokens of the row."""
    return [_logprob(row, token, top) for row, token in zip(logits, tokens, strict=True)]


def _logprob(row: Floats, token: int, top: int) -> TokenLogprob:
    highest = float(row.max())
    total = highest + math.log(float(np.exp(row.astype(np.float64) - highest).sum()))

    def logprob(value: float) -> float:
        return float(np.float32(max(value - total, LEAST)))

    best: list[tuple[int, float]] = []
    if top:
        count = min(top, len(row))
        ids = largest(row, np.partition(row, -count)[-count], count)
        best = sorted(((int(i), logprob(float(row[i]))) for i in ids), key=lambda one: (-row[one[0]], one[0]))
        best += [(0, LEAST)] * (top - count)
    return TokenLogprob(logprob(float(row[token])), 1 + int((row > row[token]).sum()), tuple(best))
