"""The verification time model, evaluated by the scheduler thousands of times a second.

    time = c0 + c1·jobs + c2·later tokens + c3·Σ new × context / 10⁶ + c4·Σ context / 10⁶ + c5·rows + c6·first tokens

in milliseconds, with non-negative coefficients. The weights' products are linear in the new tokens, of which the first
`KNEE` have a price of their own: there the weights' way from memory still hides part of the arithmetic. Attention's
score and value products are linear in new × context, reading the cache in the context, and the logits' product in the
rows of logits; the constant is the price of touching the weights at all. `shared.cost.fit` fits the coefficients; here
they are only used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shared.messages import BatchShape, CostModel

MILLION = 1e6
KNEE = 8
"""New tokens of a batch that have a price of their own."""
SIZE = 7
"""Coefficients."""
TYPICAL_LENGTH = 256
"""Tokens of a session."""

FALLBACK = CostModel(
    verifier="any",
    coefficients=[40.0, 0.5, 1.5, 600.0, 3000.0, 0.7, 0.7],
    ratio_p50=1.0,
    ratio_p90=1.5,
    ratio_p99=3.0,
    samples=0,
    version=0,
)
"""Used for a verifier that has not been profiled yet: a 135M-parameter model on one CPU core, roughly."""


class Shape(Protocol):
    """What a batch's time depends on; `BatchShape` is the one that travels."""

    @property
    def jobs(self) -> int:
        """See `BatchShape`."""

    @property
    def new_tokens(self) -> int:
        """See `BatchShape`."""

    @property
    def new_context(self) -> int:
        """See `BatchShape`."""

    @property
    def context(self) -> int:
        """See `BatchShape`."""

    @property
    def rows(self) -> int:
        """See `BatchShape`."""


def features(shape: Shape) -> tuple[float, ...]:
    """The `SIZE` numbers that the coefficients multiply."""
    first = min(shape.new_tokens, KNEE)
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
    """Expected time of a batch of this shape, in milliseconds; 0 for an empty one. Never less for a larger shape."""
    if not shape.jobs:
        return 0.0
    # Written out: a product over `features` would take three times as long.
    batch, job, later, pair, held, row, first = model.coefficients
    new = shape.new_tokens
    tokens = first * new if new <= KNEE else first * KNEE + later * (new - KNEE)
    attention = (pair * shape.new_context + held * shape.context) / MILLION
    return batch + job * shape.jobs + tokens + attention + row * shape.rows


def fixed_ms(model: CostModel) -> float:
    """Time of a batch beside its jobs' own: reading the weights once."""
    return model.coefficients[0]


def token_ms(model: CostModel) -> float:
    """What one more verified token adds to a batch, its logits and its attention to a session of typical length
    included."""
    _, _, later, pair, _, row, _ = model.coefficients
    return later + row + pair * TYPICAL_LENGTH / MILLION


def shape_of(jobs: Iterable[tuple[int, int, int]]) -> BatchShape:
    """Shape of a batch of jobs, each given as (new tokens, the session's length after them, rows of logits)."""
    shape = EMPTY
    for new, length, rows in jobs:
        shape = grow(shape, new, length, rows)
    return shape


def grow(shape: BatchShape, new: int, length: int, rows: int) -> BatchShape:
    """The shape with one more job."""
    # Built without validation: the scheduler does this thousands of times a second.
    return BatchShape.model_construct(
        jobs=shape.jobs + 1,
        new_tokens=shape.new_tokens + new,
        new_context=shape.new_context + new * length,
        context=shape.context + length,
        rows=shape.rows + rows,
    )


EMPTY = BatchShape(jobs=0, new_tokens=0, new_context=0, context=0)
"""The shape of nothing."""
