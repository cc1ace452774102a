"""Batches beside runs: no run is starved by rounds and prompts, and none of these by runs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import MODEL, NOW, pending, queue_of, verifier

from services.scheduler.core.batching import BatchLimits, BatchPlan
from services.scheduler.core.policies import POLICIES, PolicyOptions, Situation
from services.scheduler.core.pool import PendingRound, VerifierState
from services.scheduler.core.verifier_runs import RunningRun
from shared import cost
from shared.kernels.layout import BLOCK

CAUTION = MODEL.ratio_p90
EPSILON = 1e-6

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=12)
"""Lengths of the sessions in runs."""
slacks = st.lists(st.floats(-500, 4000), min_size=1, max_size=12)
"""Times until the next step should end for runs."""
arrivals = st.floats(NOW - 6000, NOW)
dues = st.none() | st.floats(NOW - 3000, NOW + 6000)
limits_ = st.builds(BatchLimits, st.floats(60, 800), st.just(4096), st.floats(100, 8000))


def with_runs(in_runs: list[int], cached: dict[str, int] | None = None) -> VerifierState:
    state = verifier(dict(cached or {}))
    for i, length in enumerate(in_runs):
        state.runs.set(f"run-{i}", RunningRun(length, "d", NOW))
    return state


def planned(
    rounds: list[PendingRound], state: VerifierState, limits: BatchLimits, due: list[float], now: float = NOW
) -> BatchPlan:
    policy = POLICIES["wisp+"](PolicyOptions())
    return policy.plan(queue_of(rounds, state, limits), Situation(state, limits, now, runs_due_ms=due))


def with_block(state: VerifierState, one: PendingRound) -> float:
    """Time of a step of the runs and the next block of a prompt."""
    held = one.held(state.cached.get(one.session_id, 0))
    end = (held // BLOCK + 1) * BLOCK
    shape = state.runs.shape.copy()
    shape.add(end - held, end, 0)
    return cost.predict_ms(state.model, shape)


@settings(max_examples=3 * settings.default.max_examples)
@given(lengths, slacks, st.lists(st.tuples(arrivals, dues, st.integers(1, 2000)), min_size=1, max_size=20), limits_)
def test_rounds_keep_runs_on_time(
    in_runs: list[int], slack: list[float], drawn: list[tuple[float, float | None, int]], limits: BatchLimits
) -> None:
    """The exceptions are the first urgent round, and a batch in which no round fits: one is sent all the same."""
    rounds = [pending(f"s{i}", arrived=at, due=due, base=base) for i, (at, due, base) in enumerate(drawn)]
    state = with_runs(in_runs, {one.session_id: one.verify.base_len - 1 for one in rounds})
    shape = state.runs.shape.copy()
    shape.add(1, max(one.verify.base_len for one in rounds), 1)
    made = planned(rounds, state, limits, [NOW + one for one in slack])
    for one in slack:
        if one / CAUTION >= cost.predict_ms(MODEL, shape):
            assert made.predicted_ms <= one / CAUTION + EPSILON or len(made.chosen) == 1


@settings(max_examples=3 * settings.default.max_examples)
@given(lengths, slacks, st.lists(st.tuples(arrivals, st.integers(BLOCK + 2, 3000)), min_size=1, max_size=8), limits_)
def test_prompts_without_an_slo_take_at_most_a_block_from_runs(
    in_runs: list[int], slack: list[float], drawn: list[tuple[float, int]], limits: BatchLimits
) -> None:
    prompts = [pending(f"p{i}", arrived=at, base=base) for i, (at, base) in enumerate(drawn)]
    state = with_runs(in_runs)
    block_ms = max(with_block(state, one) for one in prompts)
    made = planned(prompts, state, limits, [NOW + one for one in slack])
    for one in slack:
        if one / CAUTION >= block_ms:
            assert made.predicted_ms <= one / CAUTION + EPSILON


@settings(max_examples=3 * settings.default.max_examples // 2)
@given(
    lengths,
    st.integers(0, 20),
    st.sampled_from([20, 150, 900]),
    st.none() | st.floats(NOW, NOW + 1500),
    st.floats(1.0, 1.5),
)
def test_runs_starve_no_round_and_rounds_no_run(
    in_runs: list[int], late: int, base: int, due: float | None, tightness: float
) -> None:
    """Runs that are due with every step, rounds that are always late, and one round or prompt of somebody else."""
    limits = BatchLimits(250.0, 4096, 1000.0)
    state = with_runs(in_runs, {f"s{i}": 19 for i in range(late)})
    victim = pending("victim", due=due, base=base)
    waiting = [pending(f"s{i}", arrived=NOW - i, due=NOW - 60_000, acceptance=(0.9,)) for i in range(late)]
    waiting.append(victim)
    now, steps_after = NOW, 0
    while victim in waiting:
        runs_ms = cost.predict_ms(MODEL, state.runs.shape)
        made = planned(waiting, state, limits, [now + runs_ms * CAUTION * tightness] * len(in_runs), now)
        # Every run gets a token in this step, and the step is as short as the longest batch or has one job.
        assert made.predicted_ms <= limits.max_batch_ms + EPSILON or len(made.chosen) == 1
        now += made.predicted_ms
        steps_after += now > victim.deadline_ms(limits.max_wait_ms)
        for chosen in made.chosen:
            if chosen.prefill_to is not None:
                state.cached[chosen.session_id] = chosen.prefill_to
                continue
            waiting.remove(chosen.pending)
            if chosen.pending is not victim:
                waiting.append(pending(chosen.session_id, arrived=now, due=now - 60_000, acceptance=(0.9,)))
        for session_id, run in list(state.runs.items()):
            state.runs.set(session_id, RunningRun(run.length + 1, "d", now))
        # Rounds that arrived before its deadline go first, and a long prompt needs a step for each of its blocks.
        assert steps_after <= 6 + late + base // BLOCK


def test_a_prompt_uses_all_of_the_time_that_runs_can_make_up_for() -> None:
    """Each chunk has a time of its own, so several small ones would take more of it."""
    state, prompt = with_runs([200] * 8), pending("p", due=NOW + 60_000, base=3000)
    due = 2 * CAUTION * with_block(state, prompt)
    made = planned([prompt], state, BatchLimits(10_000.0, 4096, 60_000.0), [NOW + due])
    (chosen,) = made.chosen
    assert chosen.prefill_to is not None
    shape = state.runs.shape.copy()
    shape.add(chosen.prefill_to + BLOCK, chosen.prefill_to + BLOCK, 0)
    assert made.predicted_ms <= due / CAUTION < cost.predict_ms(state.model, shape)
