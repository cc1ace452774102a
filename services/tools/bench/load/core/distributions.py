"""Distributions of lengths and times, and weighted choices between parts of a workload."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0, le=1e9)]
"""Bounded, so that the sum of weights is finite."""
Sigma = Annotated[float, Field(ge=0, le=20)]
"""Bounded, so that exp of a normal distribution is finite."""


class WorkloadPart(BaseModel):
    """A part of a workload's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightedPart(WorkloadPart):
    """A part that is chosen with a probability proportional to its weight."""

    weight: Weight = 1.0


class Constant(WeightedPart):
    """Always the same value."""

    distribution: Literal["constant"]
    value: Amount

    def draw(self, rng: random.Random) -> float:
        """Draw a value."""
        return self.value


class Uniform(WeightedPart):
    """Any value from `low` to `high`."""

    distribution: Literal["uniform"]
    low: Amount
    high: Amount

    @model_validator(mode="after")
    def _in_order(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, above high, which is {self.high:g}")
        return self

    def draw(self, rng: random.Random) -> float:
        """Draw a value."""
        return rng.uniform(self.low, self.high)


class Lognormal(WeightedPart):
    """exp of a normal distribution around log(median), clamped to `low` and `high`."""

    distribution: Literal["lognormal"]
    median: Positive
    sigma: Sigma
    low: Amount = 0.0
    high: Annotated[float, Field(gt=0)] = float("inf")

    @model_validator(mode="after")
    def _in_order(self) -> Lognormal:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"the median {self.median:g} is not between low {self.low:g} and high {self.high:g}")
        return self

    def draw(self, rng: random.Random) -> float:
        """Draw a value."""
        return min(self.high, max(self.low, self.median * rng.lognormvariate(0.0, self.sigma)))


class Discrete(WeightedPart):
    """One of some equally likely values."""

    distribution: Literal["choice"]
    values: Annotated[list[Amount], Field(min_length=1)]

    def draw(self, rng: random.Random) -> float:
        """Draw a value."""
        return rng.choice(self.values)


Distribution = Annotated[Constant | Uniform | Lognormal | Discrete, Field(discriminator="distribution")]
Mixture = Annotated[list[Distribution], Field(min_length=1)]

W = TypeVar("W", bound=WeightedPart)


def one_of(parts: Sequence[W], rng: random.Random) -> W:
    """Choose a part by weight."""
    return rng.choices(parts, [part.weight for part in parts])[0]


def dealt(shares: Sequence[tuple[str, float]], hand: list[str], number: int) -> str:
    """Return name `number` of a deal, counted from 0, in which any number of names is close to the shares.

    shares: names and weights. hand: the names so far, which grow.
    """
    total = sum(weight for _, weight in shares)
    while len(hand) <= number:
        owed = [weight / total * (len(hand) + 1) - hand.count(name) for name, weight in shares]
        hand.append(shares[owed.index(max(owed))][0])
    return hand[number]


def draw(mixture: Sequence[Any], rng: random.Random) -> float:
    """Draw a value from a mixture of distributions."""
    drawn: float = one_of(mixture, rng).draw(rng)
    return drawn
