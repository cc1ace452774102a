"""A verifier whose batches take the time of another machine or model."""

from __future__ import annotations

import pytest

from services.verifier.core.emulation import EmulatedCost
from services.verifier.settings import VerifierSettings
from shared.cost.model import shape_of
from shared.messages import Measurement

COEFFICIENTS = [10.0, 1.0, 2.0, 0.0, 0.0, 0.5, 1.0]
SHAPE = shape_of([(1, 100, 1), (3, 50, 3)])
TAKES_MS = 10 + 2 + 4 + 2


def test_a_batch_waits_for_the_rest_of_its_predicted_time() -> None:
    emulated = EmulatedCost(COEFFICIENTS)
    assert emulated.rest_ms([SHAPE], 5.0) == pytest.approx(TAKES_MS - 5)
    assert emulated.rest_ms([SHAPE, SHAPE], 5.0) == pytest.approx(2 * TAKES_MS - 5)
    assert emulated.rest_ms([SHAPE], 100.0) == 0
    assert emulated.rest_ms([], 0.0) == 0


@pytest.mark.parametrize(("measured", "expected"), [(5.0, TAKES_MS), (100.0, 100.0)])
def test_the_profile_gives_the_emulated_time(measured: float, expected: float) -> None:
    slowed = EmulatedCost(COEFFICIENTS).slowed(Measurement(shape=SHAPE, measured_ms=measured))
    assert slowed.measured_ms == pytest.approx(expected)


def test_an_incomplete_cost_model_is_refused() -> None:
    assert VerifierSettings(emulated_cost=COEFFICIENTS).emulated_cost == COEFFICIENTS
    with pytest.raises(ValueError, match="3 coefficients: give all 7"):
        VerifierSettings(emulated_cost=COEFFICIENTS[:3])
