"""Draft tokens without a model: whether each is right, and the confidence that a stop rule gets."""

from __future__ import annotations

import math
from functools import cache
from random import Random
from statistics import NormalDist
from typing import NamedTuple

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


class SyntheticToken(NamedTuple):
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
        first = (self._seed << 32) + (position << 10) + 4 * ahead
        chance = sigmoid(self._session + self._acceptance.token_spread * _NORMAL(_uniform(first)))
        right = _uniform(first + 2) < chance
        if self._acceptance.known:
            return SyntheticToken(DraftToken(SOURCE, float(right)), right)
        error = self._acceptance.estimate_error * _NORMAL(_uniform(first + 1))
        return SyntheticToken(DraftToken(SOURCE, sigmoid(logit(chance) + error)), right)


_NORMAL = NormalDist().inv_cdf


def _uniform(counter: int) -> float:
    """Return a number between 0 and 1, neither included: the hash of a counter.

    The hash is the finalizer of SplitMix64 (Steele and others, OOPSLA 2014): a generator per token, seeded, would take
    ten times as long.
    """
    x = (counter * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (((x ^ (x >> 31)) >> 12) + 0.5) / (1 << 52)


_MASK = (1 << 64) - 1


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
