"""Online calibration of acceptance estimates.

An estimate is sigmoid(a z + b + s): z from the trained model of the token's source, a and b learned per source over all
sessions (Platt scaling), s per session and source (`SessionOffset`). Each is a Bayesian logistic regression with a
Gaussian prior, updated token by token with one Newton step (an extended Kalman filter in information form), fading
towards its prior.
Only tokens whose predecessors were accepted are learned from: whether a token after a rejection was right is unknown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.drafter.control.features import DraftToken, Features
from services.drafter.control.weights import UNTRAINED_COPY, UNTRAINED_MODEL, Logistic
from shared.log_odds import sigmoid

SOURCE_MEMORY = 0.998
SLOPE_PRECISION = 10.0
OFFSET_PRECISION = 1.0
"""Precisions of the priors: 1 / variance, in log odds."""
LEAST_SLOPE = 0.1
"""The slope stays positive, so that calibration keeps the order of the trained model's estimates."""
LOGIT_BOUND = 8.0
"""Log odds are kept within ± this."""
REMEMBERED = 16
DEEPEST = 2
"""Positions from this one on share one memory of recent log odds."""


@dataclass
class Platt:
    """a and b of one source, with the precision matrix of their estimate."""

    a: float = 1.0
    b: float = 0.0
    aa: float = SLOPE_PRECISION
    ab: float = 0.0
    bb: float = OFFSET_PRECISION

    def logit(self, z: float) -> float:
        """Return the log odds of acceptance for the trained model's log odds z."""
        return min(LOGIT_BOUND, max(-LOGIT_BOUND, self.a * z + self.b))

    def learn(self, z: float, accepted: bool) -> None:
        """Learn from one verified token."""
        kept, fresh = SOURCE_MEMORY, 1 - SOURCE_MEMORY
        right_a = kept * (self.aa * self.a + self.ab * self.b) + fresh * SLOPE_PRECISION
        right_b = kept * (self.ab * self.a + self.bb * self.b)
        self.aa = kept * self.aa + fresh * SLOPE_PRECISION
        self.ab = kept * self.ab
        self.bb = kept * self.bb + fresh * OFFSET_PRECISION
        self.a, self.b = self._solve(right_a, right_b)
        p = sigmoid(self.logit(z))
        weight = p * (1 - p)
        self.aa += weight * z * z
        self.ab += weight * z
        self.bb += weight
        step_a, step_b = self._solve(z * (accepted - p), accepted - p)
        self.a = max(LEAST_SLOPE, self.a + step_a)
        self.b += step_b

    def _solve(self, x: float, y: float) -> tuple[float, float]:
        determinant = self.aa * self.bb - self.ab * self.ab
        return (self.bb * x - self.ab * y) / determinant, (self.aa * y - self.ab * x) / determinant


class RecentLogits:
    """The latest log odds of tokens by source and position, of tokens whose predecessors were accepted.

    They stand for the log odds that a token not drafted yet may have.
    """

    def __init__(self) -> None:
        self.added = 0
        """Number of tokens so far."""
        self._logits: dict[tuple[str, int], deque[float]] = {}

    def add(self, source: str, position: int, logit: float) -> None:
        """Remember a token whose predecessors were accepted."""
        self.added += 1
        self._logits.setdefault((source, min(position, DEEPEST)), deque(maxlen=REMEMBERED)).append(logit)

    def copy(self) -> RecentLogits:
        """Return an independent copy."""
        copied = RecentLogits()
        copied.added = self.added
        copied._logits = {key: logits.copy() for key, logits in self._logits.items()}
        return copied

    def latest(self, source: str, position: int) -> list[float]:
        """Return at most `REMEMBERED` log odds, the latest last."""
        return list(self._logits.get((source, min(position, DEEPEST)), ()))


class Calibration:
    """The calibration that all sessions of a drafter share."""

    def __init__(self, trained: Mapping[str, Logistic]) -> None:
        self._trained = trained
        self._platt: dict[str, Platt] = {}
        self.recent = RecentLogits()

    def copy(self) -> Calibration:
        """Return an independent copy: what a drafter has learned, for another one."""
        copied = Calibration(self._trained)
        copied._platt = {source: replace(platt) for source, platt in self._platt.items()}
        copied.recent = self.recent.copy()
        return copied

    def model_logit(self, token: DraftToken, features: Features) -> float:
        """Return z: log odds by the trained model of the token's source, or by fixed weights where none was trained."""
        model = self._trained.get(token.source) or (UNTRAINED_COPY if token.support else UNTRAINED_MODEL)
        return min(LOGIT_BOUND, max(-LOGIT_BOUND, model.logit(features)))

    def logit(self, source: str, z: float) -> float:
        """Return a z + b."""
        return self._platt[source].logit(z) if source in self._platt else z

    def learn(self, source: str, z: float, accepted: bool) -> None:
        """Learn from one verified token."""
        self._platt.setdefault(source, Platt()).learn(z, accepted)
