"""Features of a drafted token, known before it is verified: the inputs of the acceptance models.

Training and the live controller compute them with the same code, so that a model sees the same inputs in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
LOGIT_MARGIN = 1e-3
"""Confidences are kept this far from 0 and 1 before their logit is taken."""
RECENT_RATE = 0.1
"""Weight of the latest verified token in the recent acceptance: a memory of about ten tokens."""

Features = tuple[float | None, ...]
"""One value per name in `NAMES`; None where it is unknown."""


@dataclass(frozen=True)
class DraftToken:
    """Statistics of one drafted token, as its source reports them.

    A token copied from earlier text has `support` and no confidence.
    """

    source: str
    confidence: float = 0.0
    """Probability of the token in the draft model's own distribution at temperature 1."""
    entropy: float = 0.0
    """Entropy of that distribution, in nats."""
    margin: float = 0.0
    """Probability of the likeliest token minus that of the second likeliest."""
    spread: float = 0.0
    """Standard deviation of the logits over the vocabulary."""
    support: int = 0
    """Number of tokens before a copied one that match, other copied ones included; 0 for tokens of a model."""
    agreed: bool = False
    """Another source proposes the same token at this position, or did at the first token of this copied run."""
    contested: bool = False
    """Another source proposes a different token at this position."""


@dataclass(frozen=True)
class RoundContext:
    """Features that all tokens of a round share."""

    temperature: float
    target_entropy: float | None
    """Entropy in nats of the target's distribution that the last committed token was chosen from. Known for recorded
    texts only: in service it is not sent, since it made almost no difference (AUC +0.001)."""
    recent: float


@dataclass
class RecentAcceptance:
    """A session's recent acceptance: moving average over verified tokens up to the first rejection of each round."""

    value: float = 0.5

    def learn(self, accepted: bool) -> None:
        """Add one token."""
        self.value += RECENT_RATE * (accepted - self.value)


def features(token: DraftToken, position: int, context: RoundContext) -> Features:
    """Return the features of the token at `position` (0 is the first) of a round's draft."""
    return (
        _finite(logit(token.confidence)),
        _finite(token.entropy),
        _finite(token.margin),
        _finite(token.spread),
        float(position),
        _finite(context.temperature),
        context.recent,
        float(token.agreed),
        float(token.contested),
        math.log1p(token.support),
        None if context.target_entropy is None else _finite(context.target_entropy),
    )


def logit(probability: float) -> float:
    """Return the log odds, finite also at 0 and 1."""
    p = min(max(probability, LOGIT_MARGIN), 1 - LOGIT_MARGIN)
    return math.log(p / (1 - p))


def _finite(value: float) -> float | None:
    # One session's broken logits must not corrupt the calibration that all sessions share.
    return value if math.isfinite(value) else None
