"""Emulation of a verifier on another machine or with another model, by waiting.

More verifiers can then run than there are cores; everything around the model is measured for real.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.cost.model import FALLBACK, predict_ms
from shared.messages import BatchShape, Measurement


class EmulatedCost:
    """Makes batches take at least as long as a cost model predicts."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        """coefficients: see `shared.cost.model`."""
        self._model = FALLBACK.model_copy(update={"coefficients": list(coefficients)})

    def rest_ms(self, shapes: Iterable[BatchShape], elapsed_ms: float) -> float:
        """Return how much longer a batch with these forward passes must take."""
        return max(0.0, sum(predict_ms(self._model, shape) for shape in shapes) - elapsed_ms)

    def slowed(self, measured: Measurement) -> Measurement:
        """Return the measurement with the time that the emulated verifier would take."""
        took_ms = measured.measured_ms + self.rest_ms([measured.shape], measured.measured_ms)
        return measured.model_copy(update={"measured_ms": took_ms})
