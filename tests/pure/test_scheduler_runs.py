"""Runs as the scheduler decides them: who gets one, what a step with runs costs, and when they end."""

from __future__ import annotations

from typing import Any

import builders
import pytest

from services.scheduler.core import runs
from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import POLICIES, PolicyOptions
from services.scheduler.core.pool import RECOVERY_TOKENS, ActiveSession
from services.scheduler.core.verifier_runs import ONE_TOKEN, PACE_STEPS, RunPace
from shared import cost
from shared.messages import Batch, Finish, Result, Status, Verify
from shared.slo import step_need

MODEL = builders.cost_model()
LIMITS = BatchLimits(max_batch_ms=400.0, max_batch_tokens=2048)
TPOT_MS = 100.0


def dispatcher(policy: str = "wisp+", **more: Any) -> Dispatcher:
    d = Dispatcher("s1", SchedulingRules(policy, LIMITS, **more))
    d.on_heartbeat(builders.heartbeat("v1", lease=1), 0.0)
    d.on_cost_model(MODEL, 0.0)
    return d


def plain(session: str = "s", round_: int = 0, base: int = 20, **more: Any) -> Verify:
    """A round whose drafter leaves the session to the verifier."""
    return builders.verify(session, round_, base, **({"run_tokens": 32} | more))


def only(d: Dispatcher, now_ms: float) -> Batch:
    ((_, batch),) = d.dispatch(now_ms)[0]
    return batch


def settled(batch: Batch, tokens: int = 1, run_left: int = 0, index: int = 0, **more: Any) -> Result:
    job = batch.jobs[index]
    return builders.result(
        job.session, job.round, job.base_len, [7] * tokens, batch=batch.batch, run_left=run_left, **more
    )


def report(session: str, base: int, tokens: int, left: int, round_: int = 1, **more: Any) -> Result:
    fields = {"run": True, "run_left": left, "batch": "run", "verify_ms": 40.0 * tokens}
    return builders.result(session, round_, base, [7] * tokens, **(fields | more))


def in_run(d: Dispatcher, session: str = "s", now_ms: float = 0.0, **more: Any) -> None:
    """Bring a session into a run."""
    d.on_verify(plain(session, **more), now_ms)
    batch = only(d, now_ms)
    assert batch.jobs[0].run is not None
    d.on_result(settled(batch, run_left=32), now_ms + 1.0)


def test_a_session_left_to_the_verifier_gets_a_run() -> None:
    d = dispatcher()
    d.on_verify(plain(run_tokens=10_000), 0.0)
    (job,) = only(d, 0.0).jobs
    assert job.run is not None
    assert (job.run.tokens, job.run.ms) == (runs.MOST_TOKENS, runs.LONGEST_MS)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "wisp+"])
def test_the_other_policies_grant_no_runs(policy: str) -> None:
    d = dispatcher(policy)
    d.on_verify(plain(), 0.0)
    assert only(d, 100.0).jobs[0].run is None
    assert d.load(0.0).run_ms is None


def test_runs_can_be_left_out() -> None:
    d = dispatcher(options=PolicyOptions(without=frozenset({"runs"})))
    d.on_verify(plain(), 0.0)
    assert only(d, 0.0).jobs[0].run is None
    assert d.load(0.0).run_ms is None


def test_a_chunk_of_a_prompt_grants_no_run_and_the_last_one_does() -> None:
    d = dispatcher()
    d.on_verify(plain(base=1000), 0.0)
    chunk = only(d, 0.0)
    assert chunk.jobs[0].prefill_to is not None
    assert chunk.jobs[0].run is None


def test_a_session_in_a_run_is_a_row_of_every_batch() -> None:
    d = dispatcher()
    d.on_verify(plain("rounds", draft=[]), 0.0)
    alone_ms = only(d, 0.0).predicted_ms
    d = dispatcher()
    in_run(d, "s", base=20)
    d.on_verify(builders.verify("rounds", 0, 20), 1.0)
    beside = only(d, 1.0)
    assert [job.session for job in beside.jobs] == ["rounds"]
    expected = cost.predict_ms(MODEL, cost.shape_of([(20, 20, 1), (1, 22, 1)]))
    assert beside.predicted_ms == pytest.approx(expected)
    assert beside.predicted_ms > alone_ms


def test_a_round_beside_runs_waits_for_nobody() -> None:
    d = dispatcher()
    in_run(d)
    state = d.fleet.verifiers["v1"]
    state.returning["other"] = 5.0
    d.on_verify(builders.verify("rounds", 1, 20), 2.0)
    assert [job.session for job in only(d, 2.0).jobs] == ["rounds"]


def test_reports_keep_a_run_up_to_its_last() -> None:
    d = dispatcher()
    in_run(d)
    state = d.fleet.verifiers["v1"]
    d.on_result(report("s", 21, 4, 28), 100.0)
    assert "s" in state.runs
    assert state.runs.shape.context == 26
    d.on_result(report("s", 25, 2, 0), 200.0)
    assert "s" not in state.runs
    assert state.runs.shape.jobs == 0
    assert "s" in state.returning, "its drafter has the turn"


@pytest.mark.parametrize("end", ["finish", "cancel", "verify", "silence", "verifier"])
def test_a_run_is_over_however_it_ends(end: str) -> None:
    d = dispatcher()
    in_run(d)
    state = d.fleet.verifiers["v1"]
    if end == "finish":
        d.on_result(report("s", 21, 1, 0, finish=Finish.STOP), 10.0)
    elif end == "cancel":
        d.on_cancel("s")
    elif end == "verify":
        d.on_verify(plain(round_=1, base=21, attempt=1), 10.0)
    elif end == "silence":
        for beat in range(12):
            d.on_heartbeat(builders.heartbeat("v1", lease=1), beat * 500.0)
        d.dispatch(runs.LOST_MS + 2.0)
    else:
        d.dispatch(2500.0)
        assert "v1" not in d.fleet.verifiers
        d.on_heartbeat(builders.heartbeat("v1", lease=1), 2600.0)
        state = d.fleet.verifiers["v1"]
    assert len(state.runs) == 0
    assert state.runs.shape.jobs == state.runs.cache_tokens == 0


def test_tokens_of_a_run_move_the_sessions_deadline() -> None:
    d = dispatcher()
    in_run(d, tpot_ms=TPOT_MS, slack_ms=500.0)
    due_ms = d.fleet.sessions["s"].due_ms
    assert due_ms is not None
    d.on_result(report("s", 21, 3, 20), 100.0)
    assert d.fleet.sessions["s"].due_ms == pytest.approx(due_ms + 3 * TPOT_MS)


@pytest.mark.parametrize("reports_first", [True, False])
def test_tokens_that_are_answered_twice_move_the_deadline_once(reports_first: bool) -> None:
    """A round that halts a run is answered with the tokens that the run's reports bring as well."""
    d = dispatcher()
    in_run(d, tpot_ms=TPOT_MS, slack_ms=500.0)
    session = d.fleet.sessions["s"]
    d.on_verify(builders.verify("s", 1, 21, tpot_ms=TPOT_MS, slack_ms=500.0), 10.0)
    due_ms = session.due_ms
    assert due_ms is not None
    halting = only(d, 10.0)
    answers = [
        report("s", 21, 3, 1),
        settled(halting, tokens=3, status=Status.CONFLICT),
    ]
    for answer in answers if reports_first else reversed(answers):
        d.on_result(answer, 100.0)
    assert session.due_ms == pytest.approx(due_ms + 3 * TPOT_MS)
    d.on_result(report("s", 24, 1, 0, round_=2), 110.0)
    assert session.due_ms == pytest.approx(due_ms + 4 * TPOT_MS)
    assert session.tokens == 1 + 3 + 1


def test_a_prompt_takes_no_more_than_a_run_makes_up_for() -> None:
    d = dispatcher()
    d.on_verify(builders.verify("prompt", 0, 2000), 0.0)
    free_ms = only(d, 0.0).predicted_ms
    d = dispatcher()
    in_run(d, tpot_ms=52.0, slack_ms=52.0)
    step_ms = cost.predict_ms(MODEL, d.fleet.verifiers["v1"].runs.shape)
    d.on_verify(builders.verify("prompt", 0, 2000), 1.0)
    beside_ms = only(d, 1.0).predicted_ms
    # The first token came in time, the step in progress brings the second one, this step the third.
    latest_ms = 1.0 + 2 * 52.0 + RECOVERY_TOKENS * (52.0 - step_ms)
    assert step_ms < beside_ms < free_ms
    assert 1.0 + step_ms + beside_ms * MODEL.ratio_p90 <= latest_ms + 1.0


def test_a_prompt_enters_the_next_step_beside_a_run_that_has_just_begun() -> None:
    d = dispatcher()
    in_run(d, tpot_ms=110.0, slack_ms=1500.0)
    d.on_verify(builders.verify("rounds", 1, 20, tpot_ms=500.0, slack_ms=500.0), 1.0)
    d.on_verify(builders.verify("prompt", 0, 100, tpot_ms=110.0, slack_ms=1500.0), 1.0)
    jobs = {job.session: job for job in only(d, 1.0).jobs}
    assert set(jobs) == {"rounds", "prompt"}
    assert jobs["prompt"].prefill_to is None, "its first token comes from this step"


def test_a_block_of_an_urgent_prompt_does_not_keep_rounds_out_beside_runs() -> None:
    """A run that the block makes late limits nothing: the step is long in any case."""
    d = dispatcher()
    in_run(d, tpot_ms=45.0, slack_ms=50.0)
    d.on_verify(builders.verify("prompt", 0, 900, tpot_ms=500.0, slack_ms=500.0), 1.0)
    d.on_verify(plain("round", round_=3, base=1, tpot_ms=500.0, slack_ms=900.0), 1.0)
    assert {job.session for job in only(d, 1.0).jobs} == {"prompt", "round"}


def test_a_round_beside_runs_is_prepared_behind_the_batch_in_flight() -> None:
    d = dispatcher()
    in_run(d)
    d.on_verify(builders.verify("a", 1, 20), 2.0)
    first = only(d, 2.0)
    d.on_verify(builders.verify("b", 1, 20), 3.0)
    assert d.dispatch(3.0)[0] == [], "others may still come before the step"
    _, later_ms = d.dispatch(3.0)
    assert later_ms is not None
    assert [job.session for job in only(d, later_ms).jobs] == ["b"]
    step_ms = cost.predict_ms(MODEL, d.fleet.verifiers["v1"].runs.shape)
    assert later_ms < 1.0 + step_ms + first.predicted_ms, "before the first batch ends"


def test_a_session_with_slow_rounds_gets_runs_that_grow() -> None:
    d = dispatcher()
    granted = []
    now, base, round_ = 0.0, 20, 0
    for _ in range(12):
        d.on_heartbeat(builders.heartbeat("v1", {"s": base - 1}, lease=1), now)
        d.on_verify(builders.verify("s", round_, base, [1, 2]), now)
        batch = only(d, now)
        (job,) = batch.jobs
        granted.append(0 if job.run is None else job.run.tokens)
        now += batch.predicted_ms
        left = granted[-1]
        d.on_result(settled(batch, run_left=left, verify_ms=batch.predicted_ms), now)
        base, round_ = base + 1, round_ + 1
        if left:
            now += left * 42.0
            d.on_result(report("s", base, left, 0, round_), now)
            base, round_ = base + left, round_ + 1
        now += 500.0  # its device is slow
    assert granted[: runs.MEASURED_ROUNDS] == [0] * runs.MEASURED_ROUNDS
    assert granted[-1] == runs.MOST_TOKENS
    assert [g for g in granted if g][:3] == [runs.FIRST_TOKENS, 2 * runs.FIRST_TOKENS, 4 * runs.FIRST_TOKENS]


def test_a_fast_session_whose_drafts_bring_much_keeps_its_rounds() -> None:
    session = ActiveSession("default", None)
    now = 0.0
    for _ in range(20):
        now += 60.0
        session.record_result(now, 50.0, 3)
    assert runs.unasked_tokens(session, 0, trimmed=False, token_ms=45.0) == 0
    assert runs.unasked_tokens(session, 0, trimmed=True, token_ms=45.0) == runs.FIRST_TOKENS


@pytest.mark.parametrize(("tpot_ms", "round_ms", "granted"), [(50.0, 110.0, 4), (40.0, 110.0, 0), (40.0, 125.0, 4)])
def test_a_session_that_a_run_would_fail_keeps_slower_rounds(tpot_ms: float, round_ms: float, granted: int) -> None:
    session = ActiveSession("default", tpot_ms)
    for number in range(1, 30):
        session.record_result(round_ms * number, 50.0, 2)
    assert runs.unasked_tokens(session, 0, trimmed=False, token_ms=45.0) == granted


def test_sessions_without_a_promise_make_room_for_those_with_one() -> None:
    d = dispatcher()
    for i in range(20):
        in_run(d, f"free-{i}", now_ms=float(i))
    state = d.fleet.verifiers["v1"]
    assert cost.predict_ms(MODEL, state.runs.shape) > TPOT_MS
    assert d.halts() == {}
    d.on_verify(plain("promised", tpot_ms=TPOT_MS, slack_ms=1000.0), 50.0)
    assert d.halts() == {"v1": [f"free-{i}" for i in range(20)]}
    assert d.halts() == {}, "each once"
    d.on_verify(plain("late", round_=3, base=40), 51.0)
    grants = {job.session: job.run for _, batch in d.dispatch(51.0)[0] for job in batch.jobs}
    assert grants["promised"] is not None
    assert grants["late"] is None


def test_promises_of_runs_fill_the_time_as_centralized_serving_does() -> None:
    """A step of all runs takes the promised time per token when all of the time is promised."""
    d = dispatcher()
    d.on_heartbeat(builders.heartbeat("v1", {f"s{i}": 254 for i in range(4)}, lease=1), 0.0)
    for i in range(4):
        in_run(d, f"s{i}", now_ms=float(i), base=255, tpot_ms=TPOT_MS, slack_ms=1000.0)
        d.fleet.sessions[f"s{i}"].away_ms = 500.0  # its drafter is far away, which a run does not notice
    found = d.load(5.0)
    assert found.run_own_ms is not None
    assert found.period_ms == TPOT_MS
    own = found.utilization - found.fixed_ms / TPOT_MS
    assert own == pytest.approx(4 * found.run_own_ms / TPOT_MS, rel=1e-3)
    most = int((TPOT_MS - found.fixed_ms) / found.run_own_ms)
    longest_ms = cost.predict_ms(MODEL, cost.shape_of([(1, 256, 1)] * most))
    assert 0.9 * TPOT_MS < longest_ms <= 1.02 * TPOT_MS


def test_a_promise_that_no_run_keeps_is_counted_in_rounds() -> None:
    d = dispatcher()
    step_ms = cost.predict_ms(MODEL, cost.shape_of([(1, 256, 1)]))
    d.on_verify(builders.verify("s", 0, 256, tpot_ms=0.9 * step_ms, slack_ms=1000.0), 0.0)
    session = d.fleet.sessions["s"]
    session.rounds = session.tokens = 0
    d._averages.tokens_per_round = 2.0
    found = d.load(1.0)
    needed = step_need(
        0.9 * step_ms,
        fixed_ms=found.fixed_ms,
        round_ms=found.round_ms,
        tokens_per_round=2.0,
        away_ms=0.0,
        run_ms=None,
    )
    assert needed is not None
    assert found.utilization == pytest.approx(needed.share + found.fixed_ms / needed.period_ms)


def test_the_price_of_a_token_counts_the_runs_beside_it() -> None:
    d = dispatcher()
    before = d.load(0.0)
    for i in range(4):
        in_run(d, f"s{i}", now_ms=float(i))
    after = d.load(5.0)
    assert after.price_ms == pytest.approx(before.price_ms + 4 * cost.token_ms(MODEL))
    assert before.run_ms is not None
    assert after.run_ms is not None
    assert after.run_ms == after.verify_ms[0] > before.run_ms


COPIED = {"copied": [0, 1, 3, 4], "trimmed_to": 6}
"""Six tokens of a run in two steps, each of which verified three copies and accepted two."""


def in_copying_run(d: Dispatcher, session: str, now_ms: float, **more: Any) -> None:
    """Bring a session into a run that copies, and report the steps that its pace is averaged over."""
    in_run(d, session, now_ms, run_copies=8, **more)
    for number in range(PACE_STEPS):
        d.on_result(report(session, 21 + 6 * number, 6, 90, number + 1, **COPIED), now_ms + 2.0)


def test_the_pace_of_a_run_that_copies_is_learned_from_its_reports() -> None:
    d = dispatcher()
    in_copying_run(d, "s", 0.0)
    (_, run), session = *d.fleet.verifiers["v1"].runs.items(), d.fleet.sessions["s"]
    assert run.pace.rows == pytest.approx(4.0, rel=0.15)
    assert run.pace.tokens == pytest.approx(3.0, rel=0.15)
    assert session.tokens_per_round(1.0) == pytest.approx(3.0, rel=0.15), "a step is a round"
    found = d.load(5.0)
    assert found.tokens_per_round == pytest.approx(3.0, rel=0.15)
    d.on_heartbeat(builders.heartbeat("v1", {"s": run.length - 1}, lease=1), 8.0)
    d.on_verify(plain("s", 40, run.length), 9.0)
    d.on_result(settled(only(d, 9.0), run_left=32), 9.5)
    (_, run) = next(iter(d.fleet.verifiers["v1"].runs.items()))
    assert run.pace == ONE_TOKEN, "its drafter allowed no copies this time"


def test_a_batch_behind_a_step_with_copies_begins_when_that_ends() -> None:
    begins = []
    for copied in ({}, COPIED):
        d = dispatcher()
        in_run(d, run_copies=8)
        for number in range(PACE_STEPS):
            d.on_result(report("s", 21 + 6 * number, 6, 90, number + 1, **copied), 2.0)
        d.on_verify(builders.verify("rounds", 1, 20), 3.0)
        only(d, 3.0)
        begins.append(d.fleet.verifiers["v1"].in_flight[0].sent_ms)
    length = 21 + 6 * PACE_STEPS
    steps = [cost.predict_ms(MODEL, cost.shape_of([(rows, length + rows, rows)])) for rows in (1, 4)]
    assert begins[0] == pytest.approx(2.0 + steps[0])
    assert begins[1] == pytest.approx(2.0 + steps[1], rel=0.03)


@pytest.mark.parametrize(("share", "copies"), [(None, 8), (1.1, 8), (0.5, 0)])
def test_copies_give_way_to_a_promise_that_they_alone_would_break(share: float | None, copies: int) -> None:
    """share: how much longer the other session's promise is than a plain step, against a step with copies."""
    d = dispatcher()
    d.on_verify(plain("copies", run_copies=8), 0.0)
    session, state = d.fleet.sessions["copies"], d.fleet.verifiers["v1"]
    session.pace = RunPace(4.0, 3.0)
    plain_ms, copying_ms = runs.step_ms(state, 20), runs.copying_step_ms(state, 20, session.pace)
    if share is not None:
        tpot_ms = plain_ms + share * (copying_ms - plain_ms)
        d.on_verify(builders.verify("promised", 1, 20, tpot_ms=tpot_ms, slack_ms=500.0), 0.0)
    grants = {job.session: job.run for _, batch in d.dispatch(0.0)[0] for job in batch.jobs}
    assert grants["copies"] is not None
    assert grants["copies"].copies == copies


def test_a_session_keeps_its_copies_beside_its_own_promise() -> None:
    """Nobody else waits for its steps, and they bring it more tokens per time."""
    d = dispatcher()
    d.on_verify(plain("s", run_copies=8, tpot_ms=TPOT_MS, slack_ms=500.0), 0.0)
    d.fleet.sessions["s"].pace = RunPace(40.0, 30.0)
    (job,) = only(d, 0.0).jobs
    assert job.run is not None
    assert job.run.copies == 8


@pytest.mark.parametrize(("pace", "granted"), [(RunPace(1.0, 1.0), False), (RunPace(4.0, 3.0), True)])
def test_rounds_have_to_beat_a_run_with_its_copies(pace: RunPace, granted: bool) -> None:
    """Here a round brings two tokens in the time of two plain steps."""
    d = dispatcher()
    d.on_verify(builders.verify("s", 40, 20, [1], run_copies=8), 0.0)
    session, state = d.fleet.sessions["s"], d.fleet.verifiers["v1"]
    session.pace, session.timed_rounds = pace, 2 * runs.TRUSTED_ROUNDS
    session.round_tokens, session.round_ms = 2.0, 2.0 * runs.step_ms(state, 20)
    assert (only(d, 0.0).jobs[0].run is not None) is granted


def test_copies_change_no_price_and_take_no_room_from_promises() -> None:
    """They are left out where a batch needs their time, so both count one token of the run."""
    loads = []
    for copied in ({}, COPIED):
        d = dispatcher()
        in_run(d, run_copies=8, tpot_ms=TPOT_MS, slack_ms=900.0)
        for number in range(PACE_STEPS):
            d.on_result(report("s", 21 + 6 * number, 6, 90, number + 1, **copied), 2.0)
        loads.append(d.load(5.0))
    plain_load, copying_load = loads
    assert copying_load.price_ms == plain_load.price_ms
    assert copying_load.utilization == plain_load.utilization
    assert copying_load.demand == plain_load.demand


def test_a_drafter_halts_its_run_but_not_a_run_for_its_slowness() -> None:
    d = dispatcher()
    in_run(d)
    d.on_verify(builders.verify("s", 1, 24), 10.0)
    (job,) = only(d, 10.0).jobs
    assert job.run is None
    d = dispatcher()
    in_run(d)
    d.fleet.sessions["s"].run_grant = 4
    d.on_verify(builders.verify("s", 2, 21), 12.0)
    assert d.fleet.pending_round("s") is None


@pytest.mark.parametrize(("base", "attempt", "at_ms"), [(22, 0, 12.0), (21, 1, 12.0), (21, 0, 800.0)])
def test_a_round_after_an_unasked_run_is_never_lost(base: int, attempt: int, at_ms: float) -> None:
    """It builds on tokens whose report has not arrived here, was sent again, or the run fell silent."""
    d = dispatcher()
    in_run(d)
    d.fleet.sessions["s"].run_grant = 4
    d.on_verify(builders.verify("s", 2, base, attempt=attempt), at_ms)
    assert d.fleet.pending_round("s") is not None
    assert "s" not in d.fleet.verifiers["v1"].runs


def test_a_promise_that_no_verifier_can_keep_takes_nobodys_run() -> None:
    d = dispatcher()
    in_run(d, "free")
    d.on_verify(plain("promised", tpot_ms=1.0, slack_ms=1000.0), 5.0)
    assert d.halts() == {}
    d.on_verify(plain("other"), 6.0)
    assert all(job.run is not None for _, batch in d.dispatch(6.0)[0] for job in batch.jobs)


def test_the_rest_of_a_prompt_is_prepared_behind_its_chunk() -> None:
    d = dispatcher()
    in_run(d, tpot_ms=200.0, slack_ms=200.0)
    d.on_verify(plain("prompt", 0, 900), 1.0)
    now, chunks = 1.0, []
    in_flight: list[Batch] = []
    while not chunks or chunks[-1] is not None:
        sends, later_ms = d.dispatch(now)
        for _, batch in sends:
            in_flight.append(batch)
            chunks.append(batch.jobs[0].prefill_to)
        assert len(in_flight) <= 2
        if len(in_flight) == 2 or later_ms is None:
            batch = in_flight.pop(0)
            to = batch.jobs[0].prefill_to
            assert to is not None
            d.on_result(settled(batch, tokens=0, status=Status.PREFILLED, cached=to, new_tokens=64), now)
        else:
            now = max(now, later_ms)
    held = [to for to in chunks if to is not None]
    assert held == sorted(set(held)), "each chunk begins where the one before it ends"
    assert d.fleet.pending_round("prompt") is None, "the last job is in flight"
    assert in_flight[-1].jobs[0].run is not None


def test_a_prompt_whose_chunks_are_lost_is_computed_anew_once() -> None:
    d = dispatcher()
    in_run(d, tpot_ms=200.0, slack_ms=200.0)
    d.on_verify(plain("prompt", 0, 900), 1.0)
    assert only(d, 1.0).jobs[0].prefill_to is not None
    d.dispatch(2500.0)
    assert "v1" not in d.fleet.verifiers
    assert d.fleet.pending_count == 1
    d.on_heartbeat(builders.heartbeat("v2", lease=1), 2600.0)
    assert only(d, 2600.0).jobs[0].session == "prompt"


def test_a_few_unlucky_rounds_are_no_reason_for_a_run() -> None:
    session = ActiveSession("default", None)
    for number in range(1, runs.TRUSTED_ROUNDS + 2):
        session.record_expected(3.0)
        session.record_result(100.0 * number, 50.0, 1)
        granted = runs.unasked_tokens(session, 0, trimmed=False, token_ms=45.0)
        assert bool(granted) == (session.timed_rounds >= runs.TRUSTED_ROUNDS), "then the drafter has been wrong"


def test_the_tokens_of_first_rounds_count_in_full() -> None:
    session = ActiveSession("default", None)
    for number in range(1 + runs.MEASURED_ROUNDS):
        session.record_result(100.0 * number, 50.0, 3)
    assert session.round_tokens == 3.0
