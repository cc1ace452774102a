"""Batches beside runs: no run is starved by rounds and prompts, none of these by runs, and copies are counted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import MODEL, NOW, pending, queue_of, verifier

from services.scheduler.core.batching import BatchLimits, BatchPlan
from services.scheduler.core.policies import POLICIES, PolicyOptions, Situation
from services.scheduler.core.pool import RECOVERY_TOKENS, ActiveSession, PendingRound, VerifierState
from services.scheduler.core.runs import copying_step_ms
from services.scheduler.core.verifier_runs import RunningRun, RunPace, VerifierRuns
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
paces = st.builds(RunPace, st.floats(1, 9), st.floats(1, 9))
"""Rows and tokens of a step without a batch, of a run that copies."""
copying = st.lists(st.tuples(st.integers(1, 3000), paces), min_size=1, max_size=12)
"""Lengths and paces of the sessions in runs."""


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


def with_copies(in_runs: list[tuple[int, RunPace]], cached: dict[str, int]) -> VerifierState:
    state = verifier(cached)
    for i, (length, pace) in enumerate(in_runs):
        state.runs.set(f"run-{i}", RunningRun(length, "d", NOW, pace))
    return state


@given(copying, st.lists(st.tuples(arrivals, dues, st.integers(1, 2000)), min_size=1, max_size=12), limits_)
def test_every_policy_counts_one_row_of_each_run_beside_a_batch(
    in_runs: list[tuple[int, RunPace]], drawn: list[tuple[float, float | None, int]], limits: BatchLimits
) -> None:
    """No run copies in a step with a batch (`services.verifier.steps`), so a batch has all the room of its plan."""
    rounds = [pending(f"s{i}", arrived=at, due=due, base=base) for i, (at, due, base) in enumerate(drawn)]
    cached = {one.session_id: one.verify.base_len - 1 for one in rounds}
    states = with_copies(in_runs, cached), with_runs([length for length, _ in in_runs], cached)
    for policy in POLICIES.values():
        copy, plain = (
            policy(PolicyOptions()).plan(queue_of(rounds, state, limits), Situation(state, limits, NOW))
            for state in states
        )
        assert copy.predicted_ms == plain.predicted_ms
        assert [(one.session_id, one.draft) for one in copy.chosen] == [
            (one.session_id, one.draft) for one in plain.chosen
        ]


@given(copying, st.lists(st.tuples(st.integers(0, 11), paces), max_size=20))
def test_a_step_without_a_batch_has_the_expected_rows_of_every_run(
    in_runs: list[tuple[int, RunPace]], changes: list[tuple[int, RunPace]]
) -> None:
    """However runs come, change their pace and end."""
    kept = {f"run-{i}": RunningRun(length, "d", NOW, pace) for i, (length, pace) in enumerate(in_runs)}
    runs = VerifierRuns()
    for session_id, run in kept.items():
        runs.set(session_id, run)
    for number, pace in changes:
        if kept.pop(name := f"run-{number}", None) is None:
            kept[name] = RunningRun(100 * number, "d", NOW, pace)
            runs.set(name, kept[name])
        else:
            runs.pop(name)
    found = runs.expected
    assert found.jobs == len(kept)
    assert abs(found.rows - sum(run.pace.rows for run in kept.values())) < EPSILON
    assert abs(found.new_tokens - found.rows) < EPSILON
    assert cost.predict_ms(MODEL, found) >= cost.predict_ms(MODEL, runs.shape) - EPSILON


@given(copying, st.floats(1, 400))
def test_steps_before_a_batch_bring_what_copies_bring(in_runs: list[tuple[int, RunPace]], tpot_ms: float) -> None:
    """A run is due again after the tokens of its pace; what it can make up for is what its pace leaves it."""
    state = with_copies(in_runs, {})
    sessions = {f"run-{i}": ActiveSession("c", tpot_ms, NOW + tpot_ms) for i in range(len(in_runs))}
    step_ms = cost.predict_ms(MODEL, state.runs.expected)
    assert abs(state.step_left_ms(NOW + 0.25 * step_ms) - 0.75 * step_ms) < EPSILON
    due = state.runs_due_ms(sessions, NOW + 3 * step_ms)
    for (_, pace), one in zip(in_runs, due, strict=True):
        spare = RECOVERY_TOKENS * max(0.0, tpot_ms - step_ms / pace.tokens)
        assert abs(one - (NOW + tpot_ms + 3 * pace.tokens * tpot_ms + spare)) < 1e-3


@given(copying, paces, st.integers(1, 3000))
def test_a_further_run_is_counted_like_those_that_are_there(
    in_runs: list[tuple[int, RunPace]], pace: RunPace, length: int
) -> None:
    state = with_copies(in_runs, {})
    expected_ms = copying_step_ms(state, length, pace)
    state.runs.set("further", RunningRun(length, "d", NOW, pace))
    assert abs(expected_ms - cost.predict_ms(MODEL, state.runs.expected)) < EPSILON


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
