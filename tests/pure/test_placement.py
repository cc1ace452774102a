"""Placement on an accelerator: sessions and their prompts share the room of a verifier's steps."""

from __future__ import annotations

from collections import Counter

import builders
import pytest
from test_policies_accelerator import ACCELERATOR, HIDDEN

from services.scheduler.core.fleet import VerifierFleet
from services.scheduler.core.placement import period_ms
from services.scheduler.core.pool import ActiveSession, PendingRound
from shared import cost

SPEEDS = {"fast": 1.0, "slow": 0.75}


def placed(sessions: int, prompt_rate: float) -> Counter[str]:
    """Sessions on each of two verifiers, after each has sent a prompt."""
    fleet = VerifierFleet(3000.0, migrate=True, mix=False)
    fleet.prompt_rate = prompt_rate
    for name, speed in SPEEDS.items():
        fleet.on_heartbeat(builders.heartbeat(name, free_tokens=100_000, total_tokens=100_000), 0.0)
        slower = [ms / speed for ms in ACCELERATOR.coefficients]
        fleet.on_cost_model(ACCELERATOR.model_copy(update={"verifier": name, "coefficients": slower}), 0.0)
    for i in range(sessions):
        fleet.sessions[f"s{i}"] = ActiveSession("default", 50.0)
        fleet.add(PendingRound(builders.verify(f"s{i}", 0, 300, []), 0.0, 2000.0), 0.0)
        pending = fleet.remove(f"s{i}")
        assert pending is not None
    return Counter(session.verifier_id or "" for session in fleet.sessions.values())


def test_sessions_spread_before_prompts_fill_the_fastest_verifier() -> None:
    assert placed(30, 0.0) == {"fast": 30}, "without prompts a step hides the rounds of all"
    assert placed(30, 2.0)["slow"] >= 5


def test_prompts_lengthen_a_period_by_what_is_not_hidden() -> None:
    calm = period_ms(ACCELERATOR, 10, 300, 0.0)
    hidden = period_ms(ACCELERATOR, 10, 300, 0.5 * HIDDEN / calm)
    assert calm < hidden < 1.06 * calm
    rate = 2.3
    busy = period_ms(ACCELERATOR, 10, 300, rate)
    tokens = round(rate * busy)
    rounds = [(3, 300, 3)] * 10
    assert busy == pytest.approx(cost.predict_ms(ACCELERATOR, cost.shape_of([*rounds, (tokens, 256, 0)])), rel=0.01)


def test_cost_models_of_verifiers_that_are_gone_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.scheduler.core.fleet.REMEMBERED", 3)
    fleet = VerifierFleet(3000.0, migrate=True, mix=False)

    def seen(name: str, ms: float) -> float:
        """A verifier joins, is measured and leaves. Return the cost of a token by which it was predicted at first."""
        fleet.on_heartbeat(builders.heartbeat(name), 0.0)
        before = cost.token_ms(fleet.verifiers[name].model)
        fleet.on_cost_model(builders.cost_model(name, (ms,) * cost.SIZE), 0.0)
        fleet.drop(name, 0.0)
        return before

    first = [seen(f"v{i}", 10.0 + i) for i in range(5)]
    assert set(first) == {cost.token_ms(cost.FALLBACK)}
    assert seen("v4", 14.0) == cost.token_ms(builders.cost_model("v4", (14.0,) * cost.SIZE)), "it was away for a while"
    assert seen("v0", 10.0) == cost.token_ms(cost.FALLBACK), "it was forgotten"


def test_more_prompts_than_a_verifier_computes_do_not_break_the_period() -> None:
    assert 0 < period_ms(ACCELERATOR, 10, 300, 2.5) < period_ms(ACCELERATOR, 10, 300, 2.7)
    assert period_ms(ACCELERATOR, 10, 300, 100.0) < 10_000
