"""Draft tokens without a model: their chances to be accepted, and the estimates of these that a stop rule sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random

from services.drafter.control import ControlWeights, DraftToken
from services.drafter.control.features import logit
from services.drafter.control.weights import Inputs, Logistic
from shared.log_odds import sigmoid
from shared.twin.spec import Acceptance

SOURCE = "hidden"
"""Name of the draft source: a model beside the user."""
WEIGHTS = ControlWeights(
    acceptance={
        SOURCE: Logistic(inputs=Inputs(features=["confidence"], mean=[0.0], scale=[1.0]), weights=[1.0], bias=0.0)
    }
)
"""The acceptance model of synthetic drafts: it estimates the acceptance as the token's confidence."""
STEPS = 400


@dataclass(frozen=True)
class SyntheticToken:
    """A draft token as the controller sees it, and whether it equals the target's own choice."""

    token: DraftToken
    right: bool


class DraftProcess:
    """The draft tokens of one request. The same seed gives the same tokens in any order and arm."""

    def __init__(self, acceptance: Acceptance, seed: int) -> None:
        self._acceptance = acceptance
        self._seed = seed
        centre = central_logit(acceptance.mean, math.hypot(acceptance.session_spread, acceptance.token_spread))
        self._session = Random(f"{seed}/session").gauss(centre, acceptance.session_spread)

    def token(self, position: int, ahead: int) -> SyntheticToken:
        """Return the token drafted for an output position, `ahead` tokens after the last committed one."""
        rng = Random(f"{self._seed}/{position}/{ahead}")
        chance = sigmoid(rng.gauss(self._session, self._acceptance.token_spread))
        estimate = sigmoid(logit(chance) + rng.gauss(0.0, self._acceptance.estimate_error))
        return SyntheticToken(DraftToken(SOURCE, estimate), rng.random() < chance)


@cache
def central_logit(mean: float, spread: float) -> float:
    """Return the centre of normally distributed log odds whose probabilities have this mean."""
    low, high = -20.0, 20.0
    for _ in range(60):
        centre = (low + high) / 2
        low, high = (centre, high) if _mean(centre, spread) < mean else (low, centre)
    return (low + high) / 2


def _mean(centre: float, spread: float) -> float:
    """Return the mean of sigmoid(x) for x normally distributed, by a sum over equally likely quantiles."""
    if not spread:
        return sigmoid(centre)
    points = [-4 + 8 * (i + 0.5) / STEPS for i in range(STEPS)]
    weights = [math.exp(-x * x / 2) for x in points]
    return math.fsum(w * sigmoid(centre + spread * x) for w, x in zip(weights, points, strict=True)) / sum(weights)
