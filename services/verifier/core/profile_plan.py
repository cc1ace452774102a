"""Choice of the batches that the start-up profile measures within its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log1p

import numpy as np
from numpy.typing import NDArray

from shared import cost
from shared.cost.fit import VerifierFit
from shared.messages import BatchShape, CostModel, Measurement

KINDS = (
    (1, 1, 1),
    (1, 5, 5),
    (1, 9, 9),
    (1, 48, 0),
    (1, 256, 0),
    (4, 1, 1),
    (4, 9, 9),
    (12, 1, 1),
    (12, 5, 5),
    (32, 1, 1),
)
"""Jobs of a batch, new tokens and rows of logits of each: rounds without and with a draft, and chunks of a prompt."""
CONTEXTS = (64, 256, 1024)
"""Cached tokens of each job: multiples of a block."""
CAUTION = 1.5
"""A batch is started only if this multiple of its longest expected time is left."""
ENOUGH = 0.25
"""The plan ends when no batch has a greater variance of its prediction, relative to that of one measurement."""
PRIOR = 1e-3
"""Weight of a prior on each coefficient, which keeps the design matrix invertible."""


@dataclass(frozen=True)
class ProfileBatch:
    """A batch of equal jobs, each with `context` cached tokens, `new` tokens and `rows` rows of logits."""

    jobs: int
    new: int
    rows: int
    context: int

    @property
    def shape(self) -> BatchShape:
        """Its shape."""
        return cost.shape_of([(self.new, self.context + self.new, self.rows)] * self.jobs)


def profile_batches(room: int, max_len: int, block: int) -> list[ProfileBatch]:
    """Return the batches that fit `room` tokens in blocks of `block` and the model's context, the smallest first."""
    found = []
    for context in CONTEXTS:
        for jobs, new, rows in KINDS:
            blocks = -(-(context + new) // block)
            if context + new <= max_len and jobs * blocks * block <= room:
                found.append(ProfileBatch(jobs, new, rows, context))
    return found


class ProfilePlan:
    """Chooses one batch after the other, from the times of those before.

    The next batch is the one that determines the coefficients best per millisecond: it has the greatest gain of the
    determinant of the design (Fedorov, Theory of Optimal Experiments, 1972). A batch that may not end within the
    budget is never started, so a slow machine measures fewer and smaller batches. The smallest batch is measured
    first, and again: its first time includes loading and touching memory, and is used only if no other follows.
    """

    def __init__(self, batches: Sequence[ProfileBatch], budget_ms: float, limit_ms: float) -> None:
        """batches: the candidates, the smallest first. budget_ms: time for those after the first. limit_ms: for all."""
        self._batches = batches
        self._budget_ms = budget_ms
        self._limit_ms = limit_ms
        self._begun_ms = 0.0
        self._measured: list[Measurement] = []
        self._cold = True

    @property
    def measured(self) -> Sequence[Measurement]:
        """The measurements that count."""
        return self._measured

    def add(self, batch: ProfileBatch, measured_ms: float) -> None:
        """Add the time of a batch that `next` returned."""
        if self._measured and self._cold:
            self._measured.clear()
            self._cold = False
        self._measured.append(Measurement(shape=batch.shape, measured_ms=measured_ms))

    def next(self, spent_ms: float) -> ProfileBatch | None:
        """Return the batch to measure after `spent_ms`; None at the end."""
        if not self._measured:
            return self._batches[0] if self._batches else None
        if self._cold:
            self._begun_ms = spent_ms
        left_ms = min(self._limit_ms, self._begun_ms + self._budget_ms) - spent_ms
        if self._cold:
            fits = self._measured[0].measured_ms <= left_ms
            return self._batches[0] if fits else None
        fit = VerifierFit("profile")
        fit.start_from(self._measured)
        model = fit.model()
        design = _design(self._measured, model)
        best: ProfileBatch | None = None
        most = 0.0
        for batch in self._batches:
            shape = batch.shape
            if CAUTION * longest_ms(shape, self._measured, model) > left_ms:
                continue
            expected_ms = cost.predict_ms(model, shape)
            row = np.array(cost.features(shape, model.knee)) / expected_ms
            variance = float(row @ np.linalg.solve(design, row))
            gain = log1p(variance) / expected_ms
            if variance > ENOUGH and gain > most:
                best, most = batch, gain
        return best


def _design(measured: Sequence[Measurement], model: CostModel) -> NDArray[np.float64]:
    """Return the sums X'X of the relative errors' rows, with a prior that gives each coefficient a finite variance."""
    rows = np.array([np.array(cost.features(one.shape, model.knee)) / one.measured_ms for one in measured])
    shares = np.maximum(np.abs(model.coefficients), 1e-6)
    design: NDArray[np.float64] = rows.T @ rows + PRIOR * np.diag(1 / shares**2)
    return design


def longest_ms(shape: BatchShape, measured: Sequence[Measurement], model: CostModel) -> float:
    """Return the longest expected time of a batch.

    Its matrix products take at most the time of a measured batch times the growth of jobs, tokens or rows: a part of
    every batch's time is constant, and it hides no more arithmetic than it takes itself. The cost model predicts the
    time of attention.
    """

    def growth(one: BatchShape) -> float:
        rows = shape.rows / one.rows if one.rows else inf if shape.rows else 0.0
        return max(1.0, shape.jobs / one.jobs, shape.new_tokens / one.new_tokens, rows)

    attention = model.coefficients[3] * shape.new_context + model.coefficients[4] * shape.context
    return min(one.measured_ms * growth(one.shape) for one in measured) + attention / 1e6
