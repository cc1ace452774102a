"""The demand on verifiers, by which their number is scaled."""

from __future__ import annotations

import builders
import pytest
from test_policies_accelerator import ACCELERATOR
from test_scheduler import dispatcher, promised, result, sent

from services.scheduler.core.demand import SessionNeed, alone_ms, demand, session_need
from services.scheduler.core.dispatch import Dispatcher
from shared import cost
from shared.messages import Load

STEP_MS = alone_ms(ACCELERATOR)


def need(tpot_ms: float, *, runs: bool = True, tokens_per_round: float = 3.0) -> SessionNeed | None:
    return session_need(
        ACCELERATOR, tpot_ms, runs=runs, round_tokens=5.0, tokens_per_round=tokens_per_round, away_ms=25.0
    )


def load_of(sessions: int, tpot_ms: float | None = 50.0, verifiers: int = 1) -> Load:
    d = dispatcher("wisp+", *(builders.heartbeat(f"v{i}") for i in range(verifiers)))
    for i in range(verifiers):
        d.on_cost_model(ACCELERATOR.model_copy(update={"verifier": f"v{i}"}), 0.0)
    for i in range(sessions):
        d.on_verify(promised(f"s{i}", tpot_ms), 0.0)
    return d.load(1.0)


def test_a_session_near_the_promise_demands_little_of_an_accelerator() -> None:
    """A step of 42 ms is most of the 50 that are promised, whatever the number of verifiers."""
    one = load_of(1)
    assert one.demand < 0.02
    assert one.utilization > 0.8


def test_only_an_accelerator_tells_gateways_its_room() -> None:
    """128 tokens in steps of 50 ms, and what the last 5 ms hold."""
    room = load_of(3).room_tokens_per_ms
    assert room == pytest.approx((128 + 5 / 0.36) / 50, rel=0.1)
    assert load_of(3).demand == pytest.approx(3 / 50 / room)
    assert dispatcher("wisp+").load(1.0).room_tokens_per_ms is None


def test_demand_grows_with_sessions_and_falls_with_verifiers() -> None:
    one, ten = load_of(1), load_of(10)
    assert ten.demand == pytest.approx(10 * one.demand)
    assert load_of(10, verifiers=2).demand == pytest.approx(5 * one.demand)


def test_full_demand_is_a_step_as_long_as_the_promise() -> None:
    wanted = need(50.0)
    assert wanted == SessionNeed(1 / 50.0, 50.0)
    sessions = 1
    while cost.predict_ms(ACCELERATOR, cost.shape_of([(1, cost.model.TYPICAL_LENGTH, 1)] * (sessions + 1))) <= 50.0:
        sessions += 1
    assert demand(ACCELERATOR, [wanted] * sessions, 0.0) == pytest.approx(1.0, abs=0.02)


def test_the_shortest_promise_counts_for_all() -> None:
    fast, slow = need(50.0), need(150.0)
    assert fast is not None
    assert slow is not None
    assert demand(ACCELERATOR, [fast, slow], 0.0) == pytest.approx(4 / 3 * demand(ACCELERATOR, [fast], 0.0))


def test_a_promise_shorter_than_a_step_needs_rounds() -> None:
    assert need(STEP_MS - 1) == SessionNeed(5 / (3 * (STEP_MS - 1)), pytest.approx((3 * (STEP_MS - 1) - 25) / 1.5))
    assert need(STEP_MS - 1, tokens_per_round=1.0) is None, "no verifier keeps it"
    assert need(STEP_MS + 1, runs=False) != need(STEP_MS + 1)


def test_prompts_demand_their_share_without_any_promise() -> None:
    assert demand(cost.FALLBACK, [], 0.25) == pytest.approx(0.25)
    assert load_of(3, None).demand == 0.0
    d = dispatcher("wisp+")
    prompt_done(d)
    assert 0.02 < d.load(500.0).demand < 0.2


def prompt_done(d: Dispatcher) -> None:
    d.on_verify(builders.verify("p", 0, 200, []), 0.0)
    ((_, batch),) = sent(d, 0.0)
    d.on_result(result(batch, batch.jobs[0], new_tokens=200), 400.0)


def test_a_load_of_an_earlier_scheduler_has_no_demand() -> None:
    fields = builders.load().model_dump(mode="json", exclude={"demand"})
    assert Load.model_validate(fields).demand == 0.0
