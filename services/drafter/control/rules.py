"""Stop rules: whether a drafted token is worth sending, and whether to draft another. Pure.

One object per session, since some learn. Every rule is asked the same two questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.drafter.control.features import Features
from services.drafter.control.guess import Guess
from services.drafter.control.weights import Predictor


@dataclass
class Standing:
    """A round so far: what sending it as it is would bring, in expectation."""

    ms: float
    """Time of the round, the drafting done for it included."""
    tokens: float = 1.0
    """The bonus token, and each kept draft token by its chance of survival."""
    survival: float = 1.0
    """Chance that all kept tokens are accepted."""

    def keep(self, acceptance: float, token_ms: float) -> None:
        """Add a token with the given chance after its predecessors, and the time of verifying it."""
        self.survival *= acceptance
        self.tokens += self.survival
        self.ms += token_ms


@dataclass(frozen=True)
class Judged:
    """A drafted token with what is predicted of it."""

    guess: Guess
    features: Features
    acceptance: float


class StopRule:
    """The interface, and the rule `fixed`: always the longest draft."""

    def keeps(self, standing: Standing, token: Judged, token_ms: float) -> bool:
        """Whether a drafted token is worth verifying. token_ms: what that costs, its price included."""
        return True

    def goes_on(self, standing: Standing, prospects: Sequence[float], step_ms: float, token_ms: float) -> bool:
        """Whether to draft another token.

        prospects: acceptances that it may turn out to have, equally likely. step_ms: what drafting it costs.
        """
        return True

    def learn(self, verified: int, accepted: int) -> None:
        """Take in a verified round."""


class Marginal(StopRule):
    """Go on while that raises expected tokens per time, E / T of the round.

    A drafted token's time is spent; it is kept if its survival S is worth its verification: S > (E / T) token_ms. One
    not drafted yet costs its step for certain and its verification only if it is kept:
    mean(max(0, S a - (E / T) token_ms)) > (E / T) step_ms, over the acceptances `a` it may have.

    E / T is the round's own. In simulated sessions of independent tokens the best constant rate in its place, found by
    trying, brought at most 2 % more: learning a session's long-run rate is not worth its while.
    """

    def keeps(self, standing: Standing, token: Judged, token_ms: float) -> bool:
        return standing.survival * token.acceptance * standing.ms > standing.tokens * token_ms

    def goes_on(self, standing: Standing, prospects: Sequence[float], step_ms: float, token_ms: float) -> bool:
        rate = standing.tokens / standing.ms
        gain = sum(max(0.0, standing.survival * a - rate * token_ms) for a in prospects)
        return gain > len(prospects) * rate * step_ms


class Entropy(StopRule):
    """Stop where the draft's entropy H is high: keep while 1 - sqrt(0.2 H), a bound on acceptance, is over a threshold.

    After AdaEDL (arXiv 2410.18351, with its factor 0.2), and without training as there: the threshold follows the
    share of accepted tokens to a target (steps and target are ours). Copied tokens have no entropy and are all kept.
    """

    FACTOR = 0.2
    TARGET = 0.7
    STEP = 0.01
    SMOOTHING = 0.5

    def __init__(self) -> None:
        self.threshold = 0.4
        self._share = self.TARGET

    def keeps(self, standing: Standing, token: Judged, token_ms: float) -> bool:
        if token.guess.support:
            return True
        return 1 - math.sqrt(self.FACTOR * max(0.0, token.guess.entropy)) >= self.threshold

    def learn(self, verified: int, accepted: int) -> None:
        if verified == 0:
            # Too strict to send anything, or too much of it trimmed: relax slowly.
            self.threshold = max(0.0, self.threshold - self.STEP / 10)
            return
        self._share += self.SMOOTHING * (accepted / verified - self._share)
        step = self.STEP if self._share < self.TARGET else -self.STEP
        self.threshold = min(0.95, max(0.0, self.threshold + step))


class Predicted(StopRule):
    """WISP's rule (arXiv 2601.11652): the draft ends where the predictor expects a rejection.

    The predictor knows tokens of models; copied ones are judged by their calibrated acceptance.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def keeps(self, standing: Standing, token: Judged, token_ms: float) -> bool:
        if token.guess.support:
            return 1 - token.acceptance <= self._predictor.threshold
        return self._predictor.rejection(token.features) <= self._predictor.threshold
