"""A verifier that takes as long as another machine or model would, by real waiting. Pure.

Several verifiers can then be run on fewer cores than they would need: what is measured is everything around the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.cost.model import FALLBACK, predict_ms
from shared.messages import BatchShape, Measurement


class Pace:
    """Batches take at least what a cost model with these coefficients (see `shared.cost.model`) says."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        self._model = FALLBACK.model_copy(update={"coefficients": list(coefficients)})

    def rest_ms(self, shapes: Iterable[BatchShape], elapsed_ms: float) -> float:
        """How much longer a batch that has run in these passes must take."""
        return max(0.0, sum(predict_ms(self._model, shape) for shape in shapes) - elapsed_ms)

    def slowed(self, measured: Measurement) -> Measurement:
        """A measurement as it would have been."""
        took_ms = measured.measured_ms + self.rest_ms([measured.shape], measured.measured_ms)
        return measured.model_copy(update={"measured_ms": took_ms})
