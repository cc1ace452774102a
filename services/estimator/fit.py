"""Fitting the verification time model online. Pure.

Weighted least squares on the relative error, with non-negative coefficients: every sample is divided by its measured
time, so that short and long batches count alike. Only the sums X'X and X'y are kept. Old samples fade by a constant
factor; the start-up profile fades separately, down to a floor, so that shapes which live traffic never shows keep
their meaning. A sample far from the prediction counts less (Huber's weight), so that a stalled machine moves the model
little. When the median of the last few batches is off, the speed has changed for good: everything learnt so far is
rescaled.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from shared import cost
from shared.messages import CostModel, Measurement

Array = NDArray[np.float64]

HUBER = 0.3
"""Relative errors beyond this count in proportion to 1 / error."""
PROFILE_WEIGHT = 0.1
PROFILE_FULL_UNTIL = 20
"""Live batches after which the profile's weight is down at its floor."""
RECENT = 200
SHIFT_WINDOW = 15
SHIFT = 1.25
"""A median of measured / predicted beyond this factor, either way, over the window is a change of speed."""
SWEEPS = 200
RIDGE = 1e-9


class VerifierFit:
    """The model of one verifier, updated sample by sample."""

    def __init__(self, verifier: str, forgetting: float, start: CostModel | None = None) -> None:
        self._verifier = verifier
        self._forgetting = forgetting
        self._coefficients: Array = np.array((start or cost.FALLBACK).coefficients)
        self._start = start
        self._live = _Sums()
        self._profile = _Sums()
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._latest: deque[float] = deque(maxlen=SHIFT_WINDOW)
        self._samples = start.samples if start else 0
        self._version = start.version if start else 0
        self._live_samples = 0
        self._stale = False

    def add(self, sample: Measurement, *, profile: bool = False) -> None:
        """Learn from one measured batch; one without work or time is ignored. `profile`: measured at the start."""
        if sample.shape.jobs == 0 or sample.measured_ms <= 0:
            return
        x = np.array(cost.features(sample.shape))
        predicted = float(self._coefficients @ x)
        known = self._version > 0
        error = abs(predicted / sample.measured_ms - 1) if known else 0.0
        weight = 1.0 if error <= HUBER else HUBER / error
        if profile:
            self._profile.add(x / sample.measured_ms, 1.0)
        else:
            if known:
                self._compare(sample.measured_ms / max(predicted, 1e-6))
            self._live.fade(self._forgetting)
            self._live.add(x / sample.measured_ms, weight)
            self._live_samples += 1
        self._samples += 1
        self._stale = True

    def _compare(self, ratio: float) -> None:
        self._ratios.append(ratio)
        self._latest.append(ratio)
        speed = float(np.median(self._latest))
        if len(self._latest) == SHIFT_WINDOW and not 1 / SHIFT < speed < SHIFT:
            self._coefficients = self._coefficients * speed
            for sums in (self._live, self._profile):
                sums.rescale(speed)
            self._latest.clear()

    def model(self) -> CostModel:
        """The model as it stands, with the quantiles of measured / predicted over the recent batches.

        Solved here and not with every sample: that would cost milliseconds on the cores that verify.
        """
        if self._stale:
            self._solve()
            self._version += 1
            self._stale = False
        if len(self._ratios) >= 5:
            p50, p90, p99 = (float(q) for q in np.quantile(self._ratios, (0.5, 0.9, 0.99)))
        else:
            known = self._start or cost.FALLBACK
            p50, p90, p99 = known.ratio_p50, known.ratio_p90, known.ratio_p99
        return CostModel(
            verifier=self._verifier,
            coefficients=[float(c) for c in self._coefficients],
            ratio_p50=p50,
            ratio_p90=p90,
            ratio_p99=p99,
            samples=self._samples,
            version=self._version,
        )

    def _solve(self) -> None:
        fresh = max(PROFILE_WEIGHT, 1 - self._live_samples / PROFILE_FULL_UNTIL)
        gram = self._live.gram + fresh * self._profile.gram
        target = self._live.target + fresh * self._profile.target
        if self._start is not None:
            # A restarted estimator leans on the stored model where it has seen nothing yet.
            prior = np.diag(np.maximum(np.diag(gram), RIDGE) * 0.01)
            gram = gram + prior
            target = target + prior @ np.array(self._start.coefficients)
        self._coefficients = _non_negative(gram, target, self._coefficients)


class _Sums:
    """X'X and X'y of samples whose measured value is 1 after scaling."""

    def __init__(self) -> None:
        self.gram: Array = np.zeros((5, 5))
        self.target: Array = np.zeros(5)

    def fade(self, factor: float) -> None:
        self.gram *= factor
        self.target *= factor

    def rescale(self, speed: float) -> None:
        """As if every sample had taken `speed` times as long."""
        self.gram /= speed**2
        self.target /= speed

    def add(self, x: Array, weight: float) -> None:
        self.gram += weight * np.outer(x, x)
        self.target += weight * x


def _non_negative(gram: Array, target: Array, start: Array) -> Array:
    """Minimise c'Gc - 2c't over c >= 0 by coordinate descent from `start`."""
    c = start.copy()
    for _ in range(SWEEPS):
        before = c.copy()
        for i in range(len(c)):
            if gram[i, i] > RIDGE:
                c[i] = max(0.0, c[i] + (target[i] - gram[i] @ c) / gram[i, i])
        if np.allclose(before, c, rtol=1e-6, atol=0):
            break
    return c
