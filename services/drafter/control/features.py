"""What is known of a drafted token before it is verified, as numbers for the acceptance models. Pure.

Training and the live controller make their features here, so that a model sees the same in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.drafter.control.guess import Guess

NAMES = (
    "confidence",
    "entropy",
    "margin",
    "spread",
    "position",
    "temperature",
    "recent",
    "agreed",
    "contested",
    "support",
    "target_entropy",
)
SURE = 1e-3
"""Confidences are held this far from 0 and 1 before their logit is taken."""
RECENT_RATE = 0.1
"""Weight of the latest verified token in the recent acceptance: a memory of about ten tokens."""

Features = tuple[float | None, ...]
"""One value per name in `NAMES`; None where it is not known."""


@dataclass(frozen=True)
class Context:
    """What holds for all tokens of a round."""

    temperature: float
    target_entropy: float | None
    """Entropy in nats of the target's distribution that the last token was chosen from. Recorded texts know it; it is
    not sent in service, since it made almost no difference (AUC +0.001)."""
    recent: float


@dataclass
class Recent:
    """A session's recent acceptance: moving average over verified tokens up to the first rejection of each round."""

    value: float = 0.5

    def learn(self, accepted: bool) -> None:
        """Take in one token."""
        self.value += RECENT_RATE * (accepted - self.value)


def features(guess: Guess, position: int, context: Context) -> Features:
    """The features of the token at `position` (0 is the first) of a round's draft."""
    return (
        _known(logit(guess.confidence)),
        _known(guess.entropy),
        _known(guess.margin),
        _known(guess.spread),
        float(position),
        _known(context.temperature),
        context.recent,
        float(guess.agreed),
        float(guess.contested),
        math.log1p(guess.support),
        None if context.target_entropy is None else _known(context.target_entropy),
    )


def logit(probability: float) -> float:
    """Log odds, finite at 0 and 1."""
    p = min(max(probability, SURE), 1 - SURE)
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    """The probability with log odds x."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _known(value: float) -> float | None:
    # A draft's broken logits must not poison what all its sessions have learnt.
    return value if math.isfinite(value) else None
