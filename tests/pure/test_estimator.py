"""The cost model's fit: it learns true coefficients, follows a change of speed, and shrugs off outliers."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from services.estimator.fit import VerifierFit
from shared import cost
from shared.messages import BatchShape, CostModel, Measurement

TRUE = (40.0, 0.8, 1.6, 6.0, 9.0)


def random_shape(rng: random.Random) -> BatchShape:
    pairs = []
    for _ in range(rng.randint(1, 16)):
        new = rng.choice([1, 2, 5, 9, 64])
        pairs.append((new, new + rng.randint(10, 1500)))
    return cost.shape_of((new, length, 1) for new, length in pairs)


def true_ms(shape: BatchShape, speed: float = 1.0) -> float:
    return speed * sum(c * x for c, x in zip(TRUE, cost.features(shape), strict=True))


def sample(shape: BatchShape, measured_ms: float) -> Measurement:
    return Measurement(shape=shape, measured_ms=measured_ms)


def learn(fit: VerifierFit, samples: Iterable[Measurement]) -> None:
    """Feed samples in, and ask for the model now and then, as the service does."""
    for i, measured in enumerate(samples):
        fit.add(measured)
        if i % 8 == 7:
            fit.model()


def worst_error(model: CostModel, rng: random.Random, speed: float = 1.0) -> float:
    shapes = [random_shape(rng) for _ in range(200)]
    errors = sorted(abs(cost.predict_ms(model, s) / true_ms(s, speed) - 1) for s in shapes)
    return errors[190]


def test_it_learns_from_noisy_batches() -> None:
    rng = random.Random(1)
    fit = VerifierFit("v", 0.99)
    shapes = [random_shape(rng) for _ in range(300)]
    learn(fit, (sample(shape, true_ms(shape) * rng.gauss(1, 0.03)) for shape in shapes))
    model = fit.model()
    assert worst_error(model, rng) < 0.05
    assert all(c >= 0 for c in model.coefficients)
    assert 0.95 < model.ratio_p50 < 1.05 < model.ratio_p99 < 1.2


def test_the_start_up_profile_alone_predicts_well() -> None:
    rng = random.Random(2)
    fit = VerifierFit("v", 0.99)
    for jobs in (1, 4, 8):
        for new in (1, 5, 64):
            for context in (64, 448):
                shape = cost.shape_of([(new, context + new, 1)] * jobs)
                fit.add(sample(shape, true_ms(shape)), profile=True)
    assert worst_error(fit.model(), rng) < 0.1


def test_it_follows_a_change_of_speed_within_some_tens_of_batches() -> None:
    rng = random.Random(3)
    fit = VerifierFit("v", 0.97)
    for speed, count in ((1.0, 200), (2.0, 80)):
        shapes = [random_shape(rng) for _ in range(count)]
        learn(fit, (sample(shape, true_ms(shape, speed)) for shape in shapes))
    assert worst_error(fit.model(), rng, speed=2.0) < 0.15


def test_a_stalled_machine_does_not_poison_it() -> None:
    rng = random.Random(4)
    fit = VerifierFit("v", 0.99)
    shapes = [random_shape(rng) for _ in range(300)]
    learn(fit, (sample(s, true_ms(s) * (20.0 if i % 50 == 49 else 1.0)) for i, s in enumerate(shapes)))
    assert worst_error(fit.model(), rng) < 0.1


def test_a_restarted_estimator_goes_on_from_the_stored_model() -> None:
    rng = random.Random(5)
    stored = CostModel(
        verifier="v", coefficients=list(TRUE), ratio_p50=1.0, ratio_p90=1.1, ratio_p99=1.2, samples=500, version=70
    )
    fit = VerifierFit("v", 0.99, stored)
    assert fit.model().coefficients == list(TRUE)
    for _ in range(3):
        shape = random_shape(rng)
        fit.add(sample(shape, true_ms(shape)))
    assert worst_error(fit.model(), rng) < 0.1
    assert (fit.model().version, fit.model().samples) == (71, 503)


@pytest.mark.parametrize("measured_ms", [0.0])
def test_a_sample_without_time_is_ignored(measured_ms: float) -> None:
    fit = VerifierFit("v", 0.99)
    fit.add(sample(cost.shape_of([(1, 5, 1)]), measured_ms))
    fit.add(sample(cost.EMPTY, 5.0))
    assert fit.model().coefficients == cost.FALLBACK.coefficients
    assert fit.model().samples == 0
