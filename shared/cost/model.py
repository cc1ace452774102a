"""Cost model: the predicted time of a verification batch. The scheduler evaluates it thousands of times a second.

    time = c0 + c1·jobs + c2·later tokens + c3·Σ new × context / 10⁶ + c4·Σ context / 10⁶ + c5·rows + c6·first tokens

in milliseconds, with non-negative coefficients. The weight products are linear in the new tokens. The first of them,
up to the model's knee, have a coefficient of their own, because there loading the weights from memory hides part or, on
an accelerator, all of the arithmetic. The score and value products of attention are linear in new × context, reading
the KV cache in the context, and the logits product in the rows of logits. The constant is the cost of loading the
weights once. `shared.cost.fit` fits the coefficients and chooses the knee.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from shared.messages import BatchShape, CostModel

MILLION = 1e6
KNEES = (8, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
"""Knees that a fit chooses from. The first is that of a CPU."""
SIZE = 7
"""Number of coefficients."""
TYPICAL_LENGTH = 256
"""Typical length of a session, in tokens."""

FALLBACK = CostModel(
    verifier="any",
    coefficients=[40.0, 0.5, 1.5, 600.0, 3000.0, 0.7, 0.7],
    ratio_p50=1.0,
    ratio_p90=1.5,
    ratio_p99=3.0,
    samples=0,
    version=0,
)
"""For a verifier that has not been profiled yet: roughly a 135M-parameter model on one CPU core."""


class Shape(Protocol):
    """Size of a batch, exact or expected; `BatchShape` is its form in messages."""

    @property
    def jobs(self) -> float:
        """See `BatchShape`."""

    @property
    def new_tokens(self) -> float:
        """See `BatchShape`."""

    @property
    def new_context(self) -> float:
        """See `BatchShape`."""

    @property
    def context(self) -> float:
        """See `BatchShape`."""

    @property
    def rows(self) -> float:
        """See `BatchShape`."""


def features(shape: Shape, knee: int = KNEES[0]) -> tuple[float, ...]:
    """Return the `SIZE` numbers that the coefficients multiply."""
    first = min(shape.new_tokens, knee)
    return (
        1.0,
        shape.jobs,
        shape.new_tokens - first,
        shape.new_context / MILLION,
        shape.context / MILLION,
        shape.rows,
        first,
    )


def predict_ms(model: CostModel, shape: Shape) -> float:
    """Return the expected time of a batch, in milliseconds: 0 for an empty one, never less for a larger shape."""
    if not shape.jobs:
        return 0.0
    # Written out, because a product over `features` takes three times as long.
    batch, job, later, pair, held, row, first = model.coefficients
    new, knee = shape.new_tokens, model.knee
    tokens = first * new if new <= knee else first * knee + later * (new - knee)
    attention = (pair * shape.new_context + held * shape.context) / MILLION
    return batch + job * shape.jobs + tokens + attention + row * shape.rows


def fixed_ms(model: CostModel) -> float:
    """Return the time of a batch apart from its jobs: loading the weights once."""
    return model.coefficients[0]


def token_ms(model: CostModel, batch_tokens: float = math.inf) -> float:
    """Return the time that one more verified token adds to a batch of `batch_tokens` new tokens, by default to a large
    one.

    It includes the token's logits and its attention to a session of typical length.
    """
    _, _, later, pair, _, row, first = model.coefficients
    return (first if batch_tokens < model.knee else later) + row + pair * TYPICAL_LENGTH / MILLION


def prompt_token_ms(model: CostModel, batch_tokens: float = math.inf) -> float:
    """Return the time that one more token of a prompt adds to a batch: as `token_ms`, without logits."""
    _, _, later, pair, _, _, first = model.coefficients
    return (first if batch_tokens < model.knee else later) + pair * TYPICAL_LENGTH / MILLION


def shape_of(jobs: Iterable[tuple[int, int, int]]) -> BatchShape:
    """Return the shape of jobs, each given as (new tokens, the session's length after them, rows of logits)."""
    count = new_tokens = new_context = context = all_rows = 0
    for new, length, rows in jobs:
        count += 1
        new_tokens += new
        new_context += new * length
        context += length
        all_rows += rows
    return BatchShape.model_construct(
        jobs=count, new_tokens=new_tokens, new_context=new_context, context=context, rows=all_rows
    )


def grow(shape: BatchShape, new: int, length: int, rows: int) -> BatchShape:
    """Return the shape with one more job."""
    # Built without validation: the scheduler does this thousands of times a second.
    return BatchShape.model_construct(
        jobs=shape.jobs + 1,
        new_tokens=shape.new_tokens + new,
        new_context=shape.new_context + new * length,
        context=shape.context + length,
        rows=shape.rows + rows,
    )


EMPTY = BatchShape(jobs=0, new_tokens=0, new_context=0, context=0)
"""Shape of an empty batch."""
