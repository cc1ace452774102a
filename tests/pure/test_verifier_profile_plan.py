"""The start-up profile chooses informative batches that fit its time, on slow and fast machines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.verifier.core.profile_plan import KINDS, ProfileBatch, ProfilePlan, profile_batches
from shared import cost
from shared.cost.fit import VerifierFit
from shared.cost.model import KNEES
from shared.messages import BatchShape, CostModel

BUDGET_MS = 3000.0
LIMIT_MS = 4500.0
LONGEST_MS = 5000.0
BATCHES = profile_batches(room=5120, max_len=2048, block=64)
FAST = (26.0, 0.1, 0.6, 600.0, 1500.0, 0.4, 0.2)
SLOW = (25.0, 0.5, 5.4, 300.0, 1500.0, 0.5, 5.0)
"""Compiled kernels on a CPU without bfloat16 instructions."""
VERY_SLOW = (20.0, 1.0, 34.0, 2000.0, 5000.0, 1.5, 34.0)
"""torch's bfloat16 products on the same CPU."""
GPU = (15.0, 0.05, 0.01, 5.0, 10.0, 0.005, 0.01)


@dataclass
class ProfiledMachine:
    """A machine whose batches take the time of a cost model, with a clock that only they move."""

    coefficients: tuple[float, ...]
    disturbed: Callable[[ProfileBatch, float], float] = lambda _batch, ms: ms
    spent_ms: float = 0.0
    ran: list[ProfileBatch] = field(default_factory=list)

    def profile(self, budget_ms: float = BUDGET_MS) -> ProfilePlan:
        plan = ProfilePlan(BATCHES, budget_ms, LIMIT_MS)
        while (batch := plan.next(self.spent_ms)) is not None:
            took_ms = self.disturbed(batch, true_ms(self.coefficients, batch.shape))
            self.spent_ms += took_ms
            self.ran.append(batch)
            plan.add(batch, took_ms)
        return plan


def true_ms(coefficients: tuple[float, ...], shape: BatchShape) -> float:
    return sum(c * x for c, x in zip(coefficients, cost.features(shape), strict=True))


def fitted(plan: ProfilePlan) -> CostModel:
    fit = VerifierFit("v")
    fit.start_from(plan.measured)
    return fit.model()


def typical_error(model: CostModel, coefficients: tuple[float, ...]) -> float:
    """Median error over rounds and chunks of all sizes."""
    rng = random.Random(5)
    errors = []
    for _ in range(200):
        jobs = [(new := rng.randint(1, 9), new + rng.randint(16, 1500), new) for _ in range(rng.choice([1, 2, 4, 16]))]
        if rng.random() < 0.3:
            chunk = rng.randint(16, 256)
            jobs[0] = (chunk, chunk + rng.randint(0, 1000), 0)
        shape = cost.shape_of(jobs)
        errors.append(abs(cost.predict_ms(model, shape) / true_ms(coefficients, shape) - 1))
    return sorted(errors)[100]


@pytest.mark.parametrize("coefficients", [FAST, SLOW, VERY_SLOW, GPU])
def test_a_profile_keeps_to_its_budget(coefficients: tuple[float, ...]) -> None:
    machine = ProfiledMachine(coefficients)
    machine.profile()
    assert machine.spent_ms - true_ms(coefficients, BATCHES[0].shape) <= BUDGET_MS


@st.composite
def machines(draw: st.DrawFn) -> tuple[float, ...]:
    """Coefficients of any machine: loading the weights hides as much of the first tokens' arithmetic as it takes."""
    fixed = draw(st.floats(1, 800))
    jobs, first, rows = (draw(st.floats(0, 99)) for _ in range(3))
    pairs, held = (draw(st.floats(0, 2e4)) for _ in range(2))
    later = first + draw(st.floats(0, 1)) * fixed / KNEES[0]
    return fixed, jobs, later, pairs, held, rows, first


@settings(max_examples=settings.default.max_examples // 4)
@given(coefficients=machines(), seed=st.integers(0, 2**32))
def test_no_machine_takes_more_than_five_seconds(coefficients: tuple[float, ...], seed: int) -> None:
    """Whatever the machine, and with times that vary by half: the smallest batch takes at most two seconds here."""
    rng = random.Random(seed)
    machine = ProfiledMachine(coefficients, lambda _, ms: ms * rng.uniform(1.0, 1.5))
    machine.profile()
    assert machine.spent_ms <= LONGEST_MS


@pytest.mark.parametrize(("coefficients", "within"), [(FAST, 0.02), (SLOW, 0.05), (GPU, 0.1), (VERY_SLOW, 0.5)])
def test_measured_batches_predict_others(coefficients: tuple[float, ...], within: float) -> None:
    assert typical_error(fitted(ProfiledMachine(coefficients).profile()), coefficients) < within


def test_a_fast_machine_ends_early() -> None:
    machine = ProfiledMachine(GPU)
    plan = machine.profile()
    assert machine.spent_ms < 0.25 * BUDGET_MS
    assert len(plan.measured) < 40


def test_a_slow_machine_measures_fewer_and_smaller_batches() -> None:
    fast, slow = ProfiledMachine(FAST), ProfiledMachine(VERY_SLOW)
    fast.profile()
    slow.profile()
    assert len(slow.ran) < len(fast.ran)
    assert max(batch.shape.new_tokens for batch in slow.ran) < max(batch.shape.new_tokens for batch in fast.ran)


def test_a_batch_that_does_not_fit_is_never_started() -> None:
    """Prompts' chunks are so slow here that one of 256 tokens would take longer than the whole budget."""
    chunk = next(batch for batch in BATCHES if batch.new == 256)
    machine = ProfiledMachine((10.0, 0.1, 20.0, 0.0, 0.0, 0.1, 20.0))
    assert true_ms(machine.coefficients, chunk.shape) > BUDGET_MS
    plan = machine.profile()
    assert all(batch.new < 256 for batch in machine.ran)
    assert cost.predict_ms(fitted(plan), chunk.shape) == pytest.approx(
        true_ms(machine.coefficients, chunk.shape), rel=0.2
    )


def test_the_first_time_counts_only_if_no_other_follows() -> None:
    first = [10.0]
    machine = ProfiledMachine(FAST, lambda _, ms: ms * (first.pop() if first else 1.0))
    plan = machine.profile()
    assert machine.ran[0] == machine.ran[1] == BATCHES[0]
    assert plan.measured[0].measured_ms == pytest.approx(true_ms(FAST, BATCHES[0].shape))
    stalled = ProfiledMachine((3500.0, *FAST[1:]))
    assert len(stalled.profile().measured) == 1
    assert stalled.ran == [BATCHES[0]]


def test_a_slow_first_time_leaves_time_for_others() -> None:
    """The first batch reads the weights from the disk, for two seconds: the rest has its budget up to the limit."""
    first = [2000.0]
    machine = ProfiledMachine(SLOW, lambda _, ms: first.pop() if first else ms)
    plan = machine.profile()
    assert machine.spent_ms <= LIMIT_MS
    assert len(plan.measured) > 15
    assert typical_error(fitted(plan), SLOW) < 0.05


def test_a_single_measurement_gives_a_model_that_grows_with_the_batch() -> None:
    model = fitted(ProfiledMachine(VERY_SLOW).profile(budget_ms=0.0))
    one, many = cost.shape_of([(1, 65, 1)]), cost.shape_of([(9, 700, 9)] * 16)
    assert cost.predict_ms(model, one) == pytest.approx(true_ms(VERY_SLOW, one), rel=0.01)
    assert cost.predict_ms(model, many) > 5 * cost.predict_ms(model, one)


def test_the_order_begins_with_different_batches() -> None:
    """Once the first is known, the next batches differ in jobs, tokens and context before any is repeated."""
    machine = ProfiledMachine(SLOW)
    machine.profile()
    early = machine.ran[1:6]
    assert len(set(early)) == 5
    assert {batch.context for batch in early} == {64, 1024}
    assert max(batch.jobs for batch in early) > 1
    assert any(batch.rows == 0 for batch in early)


def test_batches_fit_the_cache_and_the_context() -> None:
    for room, max_len in ((5120, 2048), (1024, 2048), (5120, 300)):
        batches = profile_batches(room, max_len, 64)
        assert batches
        for batch in batches:
            assert batch.context + batch.new <= max_len
            assert batch.jobs * (batch.context + batch.new) <= room
    assert len(profile_batches(10**6, 10**6, 64)) == 3 * len(KINDS)
    assert profile_batches(64, 2048, 64) == []
    assert ProfilePlan([], BUDGET_MS, LIMIT_MS).next(0.0) is None
