"""Trained weights of the controller: models of acceptance, which ship with a draft."""

from __future__ import annotations

import math
from functools import cached_property
from operator import mul
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.drafter.control.features import NAMES, Features
from shared.log_odds import sigmoid

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
INPUT_BOUND = 5.0
"""Standardised inputs are kept within ± this, since the training data hold none beyond."""


class _WeightsPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Inputs(_WeightsPart):
    """The features that a model reads, with their mean and standard deviation in training."""

    features: list[str]
    mean: list[Number]
    scale: list[Positive]

    @model_validator(mode="after")
    def _fit(self) -> Inputs:
        unknown = [name for name in self.features if name not in NAMES]
        if unknown:
            raise ValueError(f"unknown features {', '.join(unknown)}; known are {', '.join(NAMES)}")
        if not len(self.features) == len(self.mean) == len(self.scale):
            raise ValueError("features, mean and scale must be equally long")
        return self

    @cached_property
    def _columns(self) -> tuple[tuple[int, float, float], ...]:
        columns = zip(self.features, self.mean, self.scale, strict=True)
        return tuple((NAMES.index(name), mean, scale) for name, mean, scale in columns)

    def standardised(self, features: Features) -> list[float]:
        """Return the model's inputs; an unknown feature counts as its mean."""
        return [
            0.0 if (value := features[i]) is None else min(INPUT_BOUND, max(-INPUT_BOUND, (value - mean) / scale))
            for i, mean, scale in self._columns
        ]


class Logistic(_WeightsPart):
    """Logistic regression: log odds of acceptance, linear in the inputs."""

    inputs: Inputs
    weights: list[Number]
    bias: Number

    @model_validator(mode="after")
    def _fit(self) -> Logistic:
        if len(self.weights) != len(self.inputs.features):
            raise ValueError("one weight per feature is needed")
        return self

    def logit(self, features: Features) -> float:
        """Return the log odds that the token is accepted, given that its predecessors are."""
        return math.fsum(map(mul, self.weights, self.inputs.standardised(features))) + self.bias


class Perceptron(_WeightsPart):
    """Log odds of acceptance from one hidden layer of tanh units, as in WISP (arXiv 2601.11652; the size is ours)."""

    inputs: Inputs
    hidden: list[list[Number]]
    """One row per unit."""
    hidden_bias: list[Number]
    weights: list[Number]
    bias: Number

    @model_validator(mode="after")
    def _fit(self) -> Perceptron:
        if not len(self.hidden) == len(self.hidden_bias) == len(self.weights):
            raise ValueError("hidden, hidden_bias and weights must be equally long")
        if any(len(row) != len(self.inputs.features) for row in self.hidden):
            raise ValueError("each row of hidden needs one weight per feature")
        return self

    def logit(self, features: Features) -> float:
        """Return the log odds that the token is accepted, given that its predecessors are."""
        x = self.inputs.standardised(features)
        total = self.bias
        for row, bias, weight in zip(self.hidden, self.hidden_bias, self.weights, strict=True):
            total += weight * math.tanh(bias + sum(map(mul, row, x)))
        return total


class Predictor(_WeightsPart):
    """WISP's predictor: the draft ends before the first token whose rejection is likelier than `threshold`."""

    network: Perceptron
    threshold: Annotated[float, Field(gt=0, lt=1)]

    def rejection(self, features: Features) -> float:
        """Return the probability that the token is rejected, given that its predecessors are accepted."""
        return 1 - sigmoid(self.network.logit(features))


class ControlWeights(_WeightsPart):
    """All trained weights: the content of a controller.json."""

    version: Literal[1] = 1
    acceptance: dict[str, Logistic] = Field(default_factory=dict)
    """By draft source."""
    predictor: Predictor | None = None


def _untrained(names: list[str], weights: list[float], bias: float) -> Logistic:
    inputs = Inputs(features=names, mean=[0.0] * len(names), scale=[1.0] * len(names))
    return Logistic(inputs=inputs, weights=weights, bias=bias)


UNTRAINED_MODEL = _untrained(["confidence", "agreed"], [0.8, 0.7], -0.3)
"""Draft models are overconfident; a token that two sources propose is accepted more often."""
UNTRAINED_COPY = _untrained(["support", "agreed"], [1.3, 0.7], -1.8)
"""Acceptances of about 0.3, 0.4 and 0.5 for n-grams of 1, 2 and 3 tokens."""
