"""A verifier that takes the time of another one."""

from __future__ import annotations

import pytest

from services.verifier.core.emulation import Pace
from services.verifier.settings import VerifierSettings
from shared.cost.model import shape_of
from shared.messages import Measurement

COST = [10.0, 1.0, 2.0, 0.0, 0.0, 0.5, 1.0]
SHAPE = shape_of([(1, 100, 1), (3, 50, 3)])
TAKES_MS = 10 + 2 + 4 + 2


def test_a_batch_waits_for_the_rest_of_its_time() -> None:
    pace = Pace(COST)
    assert pace.rest_ms([SHAPE], 5.0) == pytest.approx(TAKES_MS - 5)
    assert pace.rest_ms([SHAPE, SHAPE], 5.0) == pytest.approx(2 * TAKES_MS - 5)
    assert pace.rest_ms([SHAPE], 100.0) == 0
    assert pace.rest_ms([], 0.0) == 0


@pytest.mark.parametrize(("measured", "told"), [(5.0, TAKES_MS), (100.0, 100.0)])
def test_the_profile_is_what_the_batches_will_take(measured: float, told: float) -> None:
    assert Pace(COST).slowed(Measurement(shape=SHAPE, measured_ms=measured)).measured_ms == pytest.approx(told)


def test_half_a_cost_model_is_refused() -> None:
    assert VerifierSettings(emulated_cost=COST).emulated_cost == COST
    with pytest.raises(ValueError, match="7 coefficients"):
        VerifierSettings(emulated_cost=COST[:3])
