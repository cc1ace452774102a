"""Runs against centralized serving in virtual time: the same requests, the same steps, every session in a run."""

from __future__ import annotations

import pytest
from simulated_load import INTERACTIVE, Centralized, SimulatedLoad, Suite

pytestmark = pytest.mark.slow  # minutes of virtual load


@pytest.mark.parametrize("sessions", [1, 4, 8, 16])
def test_runs_are_not_slower_than_centralized_serving(sessions: int) -> None:
    load = SimulatedLoad(sessions, seed=sessions)
    central, suite = (serving(load).run(20.0, 200.0) for serving in (Centralized, Suite))
    assert suite.tokens_per_s >= 0.97 * central.tokens_per_s
    if sessions <= 8:  # the verifier is not overloaded
        assert suite.attained >= central.attained - 0.02


@pytest.mark.parametrize("sessions", [4, 8, 16])
def test_first_tokens_of_prompts_beside_runs_come_as_soon_as_elsewhere(sessions: int) -> None:
    load = SimulatedLoad(sessions, seed=sessions, long_share=0.0)
    central, suite = (serving(load).run(20.0, 200.0) for serving in (Centralized, Suite))
    assert suite.ttft_ms <= 1.15 * central.ttft_ms
    assert suite.tpot_ms <= 1.05 * central.tpot_ms


def test_an_interactive_prompt_does_not_wait_behind_long_ones() -> None:
    """Over several loads: some 80 prompts of one differ by as much as the arms do."""
    late = [0.0, 0.0]
    for seed in range(4):
        load = SimulatedLoad(12, seed=seed, long_share=0.3)
        for arm, serving in enumerate((Centralized, Suite)):
            served = serving(load).run(20.0, 200.0).of(INTERACTIVE)
            late[arm] += sum(one.ttft_ms > INTERACTIVE.ttft_ms for one in served) / len(served)
    assert late[1] <= late[0]
