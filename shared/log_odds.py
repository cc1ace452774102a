"""Log odds of acceptance, and their offset in one session. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SESSION_MEMORY = 0.97
"""Weight of a session's tokens so far when another one is learned."""
SESSION_PRECISION = 0.5
"""Precision of an offset before the first token: 1 / variance, in log odds."""


def sigmoid(x: float) -> float:
    """Return the probability with log odds x."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def sigmoids(logits: Iterable[float], offset: float) -> list[float]:
    """Return the probabilities with these log odds, each increased by `offset`."""
    exp = math.exp  # written out: a call of `sigmoid` for each takes twice as long
    return [1 / (1 + exp(-x)) if (x := logit + offset) > -700 else 0.0 for logit in logits]


@dataclass
class SessionOffset:
    """Offset of the log odds of acceptance in one session.

    A Bayesian logistic regression with a Gaussian prior around 0, updated token by token with one Newton step.
    """

    value: float = 0.0
    precision: float = SESSION_PRECISION

    def learn(self, logit: float, accepted: bool) -> None:
        """Learn from one verified token. logit: its log odds without this offset."""
        faded = SESSION_MEMORY * self.precision
        self.precision = faded + (1 - SESSION_MEMORY) * SESSION_PRECISION
        self.value *= faded / self.precision
        p = sigmoid(logit + self.value)
        self.precision += p * (1 - p)
        self.value += (accepted - p) / self.precision
