"""Fit of the cost model (`shared.cost.model`), from a start-up profile and then online.

Weighted least squares on the relative error, with non-negative coefficients: every sample is divided by its measured
time, so that short and long batches count alike. Only the sums X'X and X'y are kept. Live samples fade by a constant
factor; the start-up profile fades down to a floor, so that shapes absent from live traffic stay calibrated. A sample
far from the prediction counts less (Huber's weight), so that a stalled machine moves the model little. When the median
of the last few batches is off, the speed has changed for good, and everything learnt so far is rescaled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import NDArray

from shared import cost
from shared.cost.model import KNEES
from shared.messages import CostModel, Measurement

Array = NDArray[np.float64]

FORGETTING = 0.99
HUBER = 0.15
"""Samples with a larger relative error count in proportion to 1 / error."""
PASSES = 4
"""Number of solutions of a profile, each with the weights from the one before."""
PROFILE_PRIOR = 0.001
"""Weight in a profile's fit of the coefficients of `cost.FALLBACK` at the profile's speed, relative to the samples: a
short profile leaves some coefficients open."""
PROFILE_WEIGHT = 0.1
PROFILE_FULL_UNTIL = 20
"""Live batches after which the profile's weight is at its floor."""
STORED_WEIGHT = 0.01
"""Weight of a stored model's coefficients, relative to samples measured since."""
RECENT = 200
FEWEST = 20
"""Fewest ratios for quantiles."""
SHIFT_WINDOW = 15
SHIFT = 1.25
"""A median of measured / predicted over the window beyond this factor, either way, is a change of speed."""
KNEE_ERROR = 0.03
KNEE_GAIN = 0.6
"""A profile takes another knee than a CPU's if the mean relative error with the CPU's is above `KNEE_ERROR`, and the
other one leaves less than the share `KNEE_GAIN` of it."""
FARTHEST = 10.0
"""Live samples count as at most this many times slower or faster than predicted."""
TINY = 1e-9


class VerifierFit:
    """The fit of one verifier's cost model, updated sample by sample."""

    def __init__(self, verifier_id: str, forgetting: float = FORGETTING, start: CostModel | None = None) -> None:
        """forgetting: weight of a batch relative to the one after it. start: a stored model to continue from."""
        known = start or cost.FALLBACK
        self._verifier = verifier_id
        self._forgetting = forgetting
        self._coefficients: Array = np.array(known.coefficients)
        self._stored: Array | None = self._coefficients if start else None
        self._quantiles = (known.ratio_p50, known.ratio_p90, known.ratio_p99)
        self._knee = known.knee
        self._live = _Sums()
        self._profile = _Sums()
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._samples = known.samples
        self._version = known.version
        self._live_samples = 0
        self._window: deque[Array] = deque()
        self._stale = False

    def start_from(self, profile: Sequence[Measurement]) -> None:
        """Discard everything and fit a start-up profile: the verifier is new, or another one of the same name."""
        self.__init__(self._verifier, self._forgetting)  # type: ignore[misc]
        measured = [one for one in profile if _usable(one)]
        if not measured:
            return
        error, predicted = self._fit_profile(measured, KNEES[0])
        if error > KNEE_ERROR:
            largest = max(one.shape.new_tokens for one in measured)
            errors = {knee: self._fit_profile(measured, knee)[0] for knee in KNEES if knee < largest}
            best = min(errors, key=errors.__getitem__, default=KNEES[0])
            if errors.get(best, error) >= KNEE_GAIN * error:
                best = KNEES[0]
            _, predicted = self._fit_profile(measured, best)
        if len(measured) >= FEWEST:
            self._quantiles = _quantiles(1 / np.maximum(predicted, TINY))
        self._samples = len(measured)
        self._stale = True

    def _fit_profile(self, measured: Sequence[Measurement], knee: int) -> tuple[float, Array]:
        """Fit a profile with a knee; return the mean relative error, and the predicted shares of the measured times."""
        self._knee = knee
        rows = np.array([self._row(one) for one in measured])
        weights: Array = np.ones(len(rows))
        assumed = np.array(cost.FALLBACK.coefficients)
        assumed /= np.median(rows @ assumed)
        for _ in range(PASSES):
            self._profile = _Sums()
            for row, weight in zip(rows, weights, strict=True):
                self._profile.add(row, weight)
            self._profile.assume(assumed, PROFILE_PRIOR)
            self._coefficients = non_negative(self._profile.gram, self._profile.target)
            predicted = rows @ self._coefficients
            weights = self._weights(rows)
        return float(np.abs(predicted - 1).mean()), predicted

    def _row(self, sample: Measurement) -> Array:
        return np.array(cost.features(sample.shape, self._knee)) / sample.measured_ms

    def add(self, sample: Measurement) -> None:
        """Add one live batch. A batch without jobs or time is ignored."""
        if not _usable(sample):
            return
        row = self._row(sample)
        if self._version > 0:
            row = row * self._limited(1 / max(float(self._coefficients @ row), TINY))
            if len(self._window) == SHIFT_WINDOW:
                self._settle(self._window.popleft())
            self._window.append(row)
            self._ratios.append(1 / max(float(self._coefficients @ row), TINY))
            self._follow()
        else:
            self._settle(row)
        self._live_samples += 1
        self._samples += 1
        self._stale = True

    @staticmethod
    def _limited(ratio: float) -> float:
        """Return the factor on a sample's row that brings measured / predicted between 1 / `FARTHEST` and `FARTHEST`.

        Otherwise a step without work, or one in which the machine stood still, would change a coefficient that few
        samples determine without bound.
        """
        return ratio / min(FARTHEST, max(1 / FARTHEST, ratio))

    def _settle(self, row: Array) -> None:
        """Add a sample to the sums, which fixes its weight and its speed."""
        self._live.fade(self._forgetting)
        self._live.add(row, float(self._weights(row)) if self._version > 0 else 1.0)

    def _weights(self, rows: Array) -> Array:
        """Return Huber's weights of samples of shape (..., coefficients)."""
        return HUBER / np.maximum(HUBER, np.abs(rows @ self._coefficients - 1))

    def _follow(self) -> None:
        """Rescale everything learnt before if the last batches show another speed."""
        if len(self._window) < SHIFT_WINDOW or len(self._ratios) < SHIFT_WINDOW:
            return
        latest = [self._ratios.pop() for _ in range(SHIFT_WINDOW)][::-1]
        speed = float(np.median(latest))
        if not 1 / SHIFT < speed < SHIFT:
            # A batch belongs to the speed that its own ratio is nearer to.
            new = [abs(log(ratio)) > abs(log(ratio / speed)) for ratio in latest]
            self._window = deque(row if is_new else row / speed for row, is_new in zip(self._window, new, strict=True))
            latest = [ratio / speed if is_new else ratio for ratio, is_new in zip(latest, new, strict=True)]
            self._coefficients = self._coefficients * speed
            if self._stored is not None:
                self._stored = self._stored * speed
            for sums in (self._live, self._profile):
                sums.rescale(speed)
        self._ratios.extend(latest)

    def model(self) -> CostModel:
        """Return the current model, with the quantiles of measured / predicted over the recent batches.

        The coefficients are solved for here and not with every sample, to save time on the cores that verify.
        """
        if self._stale:
            self._solve()
            self._version += 1
            self._stale = False
        p50, p90, p99 = _quantiles(self._ratios) if len(self._ratios) >= FEWEST else self._quantiles
        return CostModel(
            verifier=self._verifier,
            coefficients=[float(c) for c in self._coefficients],
            ratio_p50=p50,
            ratio_p90=p90,
            ratio_p99=p99,
            samples=self._samples,
            version=self._version,
            knee=self._knee,
        )

    def _solve(self) -> None:
        fresh = max(PROFILE_WEIGHT, 1 - self._live_samples / PROFILE_FULL_UNTIL)
        gram = self._live.gram + fresh * self._profile.gram
        target = self._live.target + fresh * self._profile.target
        if self._window:
            rows = np.array(self._window)
            weighted = rows * self._weights(rows)[:, None]
            gram = gram + weighted.T @ rows
            target = target + weighted.sum(0)
        if self._stored is not None:
            # After a restart, the stored model decides where nothing has been measured yet.
            prior = STORED_WEIGHT * np.diag(np.maximum(np.diag(gram), TINY))
            gram = gram + prior
            target = target + prior @ self._stored
        self._coefficients = non_negative(gram, target)


class _Sums:
    """Sums X'X and X'y over samples whose measured value is 1 after scaling."""

    def __init__(self) -> None:
        self.gram: Array = np.zeros((cost.SIZE, cost.SIZE))
        self.target: Array = np.zeros(cost.SIZE)

    def fade(self, factor: float) -> None:
        self.gram *= factor
        self.target *= factor

    def rescale(self, speed: float) -> None:
        """Rescale as if every sample had taken `speed` times as long."""
        self.gram /= speed**2
        self.target /= speed

    def assume(self, coefficients: Array, share: float) -> None:
        """Draw each coefficient to a value, with a share of the samples' weight."""
        prior = share * np.diag(np.maximum(np.diag(self.gram), TINY))
        self.gram += prior
        self.target += prior @ coefficients

    def add(self, row: Array, weight: float) -> None:
        self.gram += weight * np.outer(row, row)
        self.target += weight * row


def non_negative(gram: Array, target: Array) -> Array:
    """Minimise c'Gc - 2c't over c >= 0, G of shape (n, n) and t of shape (n).

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23), on the normal
    equations. A column without samples gets 0.
    """
    scale = np.sqrt(np.maximum(np.diag(gram), TINY**2))
    gram = gram / np.outer(scale, scale) + TINY * np.eye(len(target))
    target = target / scale
    c: Array = np.zeros(len(target))
    free = np.zeros(len(target), bool)
    for _ in range(3 * len(target)):
        gain = np.where(free, 0.0, target - gram @ c)
        if gain.max() <= TINY * max(1.0, np.abs(target).max()):
            break
        free[gain.argmax()] = True
        while True:
            solved: Array = np.zeros(len(target))
            solved[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            below = free & (solved <= 0)
            if not below.any():
                c = solved
                break
            # Step towards the solution until the first coefficient reaches 0, and keep that one at 0.
            ways = np.where(below, c / np.maximum(c - solved, TINY**2), np.inf)
            c = np.maximum(0.0, c + ways.min() * (solved - c))
            free[ways.argmin()] = False
            c[~free] = 0.0
    return c / scale


def _usable(sample: Measurement) -> bool:
    return sample.shape.jobs > 0 and sample.measured_ms > 0


def _quantiles(ratios: Array | deque[float]) -> tuple[float, float, float]:
    p50, p90, p99 = (float(q) for q in np.quantile(ratios, (0.5, 0.9, 0.99)))
    return p50, p90, p99
