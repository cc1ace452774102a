"""The cost model and its fit: it learns true coefficients, follows a change of speed, and shrugs off outliers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from statistics import median

import builders
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from services.scheduler.core.mutable_shape import MutableShape
from shared import cost
from shared.cost.fit import VerifierFit, non_negative
from shared.messages import BatchShape, CostModel, Measurement, decode, encode

TRUE = (26.0, 0.1, 0.6, 600.0, 1500.0, 0.4, 0.2)
seeds = st.integers(0, 2**32)
coefficients = st.lists(st.floats(0, 1e4), min_size=cost.SIZE, max_size=cost.SIZE)


def random_shape(rng: random.Random) -> BatchShape:
    jobs = []
    for _ in range(rng.choice([1, 2, 4, 8, 16])):
        new = rng.choice([1, 2, 5, 9, 64])
        jobs.append((new, new + rng.randint(10, 1500), 0 if new == 64 else new))
    return cost.shape_of(jobs)


def model_of(*values: float) -> CostModel:
    return builders.cost_model("v", values, ratio_p99=1.2, samples=500, version=70)


def true_ms(shape: BatchShape, speed: float = 1.0) -> float:
    return speed * sum(c * x for c, x in zip(TRUE, cost.features(shape), strict=True))


def sample(shape: BatchShape, measured_ms: float) -> Measurement:
    return Measurement(shape=shape, measured_ms=measured_ms)


def samples(rng: random.Random, count: int, speed: float = 1.0, noise: float = 0.0) -> list[Measurement]:
    shapes = [random_shape(rng) for _ in range(count)]
    return [sample(shape, true_ms(shape, speed) * max(0.1, rng.gauss(1, noise))) for shape in shapes]


def learn(fit: VerifierFit, measured: Iterable[Measurement]) -> None:
    """Feed samples in, and ask for the model now and then, as the service does."""
    for i, one in enumerate(measured):
        fit.add(one)
        if i % 8 == 7:
            fit.model()


def worst_error(model: CostModel, rng: random.Random, speed: float = 1.0) -> float:
    """95th percentile over random shapes."""
    shapes = [random_shape(rng) for _ in range(200)]
    errors = sorted(abs(cost.predict_ms(model, s) / true_ms(s, speed) - 1) for s in shapes)
    return errors[190]


def grid() -> list[BatchShape]:
    jobs = [(1, 1, 1), (1, 5, 5), (1, 48, 0), (4, 9, 9), (12, 5, 5)]
    return [cost.shape_of([(new, at + new, rows)] * count) for count, new, rows in jobs for at in (64, 448)] * 2


@given(coefficients, seeds)
def test_a_prediction_is_the_coefficients_times_the_features(values: list[float], seed: int) -> None:
    shape = random_shape(random.Random(seed))
    expected = sum(c * x for c, x in zip(values, cost.features(shape), strict=True))
    assert cost.predict_ms(model_of(*values), shape) == pytest.approx(expected, rel=1e-9, abs=1e-9)


sizes = st.integers(0, 2000)


@given(coefficients, st.tuples(st.integers(1, 64), *[sizes] * 4), st.tuples(*[sizes] * 5))
def test_a_larger_batch_never_takes_less(
    values: list[float], small: tuple[int, int, int, int, int], more: tuple[int, int, int, int, int]
) -> None:
    model = model_of(*values)
    large = MutableShape(*(a + b for a, b in zip(small, more, strict=True)))
    before, after = cost.predict_ms(model, MutableShape(*small)), cost.predict_ms(model, large)
    assert 0 <= before <= after * (1 + 1e-12)


def test_an_empty_batch_takes_no_time() -> None:
    assert cost.predict_ms(model_of(*TRUE), cost.EMPTY) == 0.0


@given(seeds)
def test_a_model_of_five_coefficients_still_predicts(seed: int) -> None:
    old = model_of(40.0, 0.8, 1.6, 6.0, 9.0)
    shape = random_shape(random.Random(seed))
    expected = 40.0 + 0.8 * shape.jobs + 1.6 * shape.new_tokens + (6 * shape.new_context + 9 * shape.context) / 1e6
    assert cost.predict_ms(old, shape) == pytest.approx(expected)
    assert cost.token_ms(old) == pytest.approx(1.6, abs=0.01)
    fields = {**msgpack.unpackb(encode(old)), "coefficients": [40.0, 0.8, 1.6, 6.0, 9.0]}
    assert decode(msgpack.packb(fields)) == old


@given(seeds)
def test_the_solver_finds_the_best_non_negative_coefficients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, target = rng.normal(size=(30, 6)) + 0.5, rng.normal(size=30)
    found = non_negative(rows.T @ rows, rows.T @ target)
    best, _ = nnls(rows, target)
    assert (found >= 0).all()
    assert np.allclose(found, best, atol=1e-5)


@settings(max_examples=settings.default.max_examples // 5)
@given(seeds)
def test_whatever_it_is_fed_the_model_is_sound(seed: int) -> None:
    rng = random.Random(seed)
    fit = VerifierFit("v")
    learn(fit, [sample(random_shape(rng), 10 ** rng.uniform(-6, 6)) for _ in range(60)])
    model = fit.model()
    assert all(c >= 0 for c in model.coefficients)
    assert 0 < model.ratio_p50 <= model.ratio_p90 <= model.ratio_p99


@settings(max_examples=settings.default.max_examples // 5)
@given(seeds)
def test_it_learns_from_noisy_batches(seed: int) -> None:
    rng = random.Random(seed)
    fit = VerifierFit("v")
    learn(fit, samples(rng, 300, noise=0.03))
    model = fit.model()
    assert worst_error(model, rng) < 0.05
    assert 0.95 < model.ratio_p50 < model.ratio_p90 < model.ratio_p99 < 1.2


def test_quantiles_are_those_of_the_recent_batches() -> None:
    rng = random.Random(7)
    fit = VerifierFit("v")
    fit.start_from([sample(shape, true_ms(shape)) for shape in grid()])
    fit.model()
    shapes = [random_shape(rng) for _ in range(400)]
    factors = [rng.choice([0.95] * 4 + [1.0] * 4 + [1.1] * 2) for _ in shapes]
    learn(fit, [sample(s, true_ms(s) * f) for s, f in zip(shapes, factors, strict=True)])
    model = fit.model()
    assert model.ratio_p50 == pytest.approx(median(factors), abs=0.04)
    assert model.ratio_p90 == pytest.approx(1.1, abs=0.04)


@settings(max_examples=settings.default.max_examples // 5)
@given(seeds)
def test_the_start_up_profile_alone_predicts_well(seed: int) -> None:
    rng = random.Random(seed)
    fit = VerifierFit("v")
    profile = [sample(shape, true_ms(shape) * rng.gauss(1, 0.01)) for shape in grid()]
    stalled = rng.randrange(len(profile))
    profile[stalled] = sample(profile[stalled].shape, profile[stalled].measured_ms * 10)
    fit.start_from(profile)
    model = fit.model()
    assert worst_error(model, rng) < 0.15
    assert (model.samples, model.version) == (len(profile), 1)


@settings(max_examples=settings.default.max_examples // 5)
@given(seeds, st.sampled_from([0.3, 0.6, 1.6, 3.0, 10.0]))
def test_it_follows_a_change_of_speed_within_some_tens_of_batches(seed: int, speed: float) -> None:
    rng = random.Random(seed)
    fit = VerifierFit("v")
    fit.start_from([sample(shape, true_ms(shape)) for shape in grid()])
    learn(fit, samples(rng, 100, noise=0.02))
    learn(fit, samples(rng, 40, speed, noise=0.02))
    model = fit.model()
    assert worst_error(model, rng, speed) < 0.12


@settings(max_examples=settings.default.max_examples // 5)
@given(seeds)
def test_a_stalled_machine_does_not_poison_it(seed: int) -> None:
    rng = random.Random(seed)
    fit = VerifierFit("v")
    measured = samples(rng, 300, noise=0.02)
    learn(fit, [sample(m.shape, m.measured_ms * (20.0 if i % 50 == 49 else 1.0)) for i, m in enumerate(measured)])
    model = fit.model()
    assert worst_error(model, rng) < 0.1


def test_a_restarted_estimator_continues_from_the_stored_model() -> None:
    rng = random.Random(5)
    fit = VerifierFit("v", start=model_of(*TRUE))
    assert fit.model().coefficients == list(TRUE)
    learn(fit, samples(rng, 3))
    model = fit.model()
    assert worst_error(model, rng) < 0.1
    assert (model.version, model.samples) == (71, 503)
    learn(fit, samples(rng, 40, speed=3.0))
    assert worst_error(fit.model(), rng, speed=3.0) < 0.12


def test_a_profile_replaces_what_was_known_of_a_verifier_of_that_name() -> None:
    rng = random.Random(6)
    fit = VerifierFit("v")
    learn(fit, samples(rng, 200, speed=8.0))
    fit.start_from([sample(shape, true_ms(shape)) for shape in grid()])
    assert worst_error(fit.model(), rng) < 0.01


@pytest.mark.parametrize("profile", [[], [sample(cost.shape_of([(1, 5, 1)]), 0.0)]])
def test_samples_without_time_or_work_are_ignored(profile: list[Measurement]) -> None:
    fit = VerifierFit("v")
    fit.start_from(profile)
    fit.add(sample(cost.shape_of([(1, 5, 1)]), 0.0))
    fit.add(sample(cost.EMPTY, 5.0))
    model = fit.model()
    assert (model.coefficients, model.samples) == (cost.FALLBACK.coefficients, 0)


def test_a_profile_of_an_accelerator_finds_the_knee_of_its_arithmetic() -> None:
    def accelerator_ms(shape: BatchShape) -> float:
        return 42.0 + 0.35 * max(0, shape.new_tokens - 120)

    rng = random.Random(5)
    shapes = [random_shape(rng) for _ in range(120)]
    fit = VerifierFit("v")
    fit.start_from([sample(shape, accelerator_ms(shape)) for shape in shapes])
    model = fit.model()
    assert model.knee in (96, 128)
    for shape in shapes:
        assert cost.predict_ms(model, shape) == pytest.approx(accelerator_ms(shape), rel=0.1)
    assert cost.token_ms(model, 20) < 0.1 * cost.token_ms(model)


def test_a_cpu_keeps_its_knee_and_live_batches_keep_a_stored_one() -> None:
    rng = random.Random(6)
    fit = VerifierFit("v")
    fit.start_from(samples(rng, 60, noise=0.05))
    assert fit.model().knee == 8
    stored = VerifierFit("v", start=model_of(*TRUE).model_copy(update={"knee": 128}))
    learn(stored, samples(rng, 20))
    assert stored.model().knee == 128


def test_steps_without_work_do_not_make_prompts_endless() -> None:
    """A step whose jobs were all stale takes no time. Seen before: 35 s for a token of a prompt, by 4 ms of a batch."""
    for seed in range(60):
        rng = random.Random(seed)
        fit = VerifierFit("v")
        for i in range(60):
            shape = cost.shape_of([(rng.choice([1, 1, 2, 5, 9, 30]), 40 + rng.randint(0, 100), 1)] * rng.randint(1, 6))
            worked = rng.random() > 0.05
            ms = (1 + 0.05 * shape.new_tokens) * max(0.2, rng.gauss(1, 0.3)) if worked else rng.choice([1e-6, 1e-3])
            fit.add(sample(shape, ms))
            if i % 5 == 4:
                assert cost.token_ms(fit.model()) < 20.0
