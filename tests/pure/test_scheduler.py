"""The scheduler's decisions: order, batches within limits, placement, pacing, repair."""

from __future__ import annotations

import random
from typing import Any

import builders
import pytest

from services.scheduler.core import pacing
from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import FORGOTTEN_MS, LOST_FACTOR, LOST_SLACK_MS, Dispatcher, SchedulingRules
from services.scheduler.core.policies import POLICIES, PolicyOptions
from services.scheduler.core.pool import ActiveSession, InFlight
from services.scheduler.core.verifier_runs import RunningRun
from shared import cost
from shared.messages import (
    SILENT_MS,
    Batch,
    CostModel,
    Finish,
    Heartbeat,
    HiddenFormat,
    Job,
    Load,
    Result,
    RoundFields,
    Status,
    Verify,
)

MODEL = builders.cost_model()
LIMITS = BatchLimits(max_batch_ms=400.0, max_batch_tokens=2048)


def verify(session: str, *, round_: int = 0, base: int = 20, draft: int = 4, slack: float | None = None) -> Verify:
    return builders.verify(session, round_, base, [1] * draft, slack_ms=slack)


def heartbeat(name: str = "v1", *, held: dict[str, int] | None = None, free: int = 10_000, **more: Any) -> Heartbeat:
    return builders.heartbeat(name, held, free_tokens=free, **more)


def result(batch: Batch, job: Job, *, tokens: int = 1, status: Status = Status.COMMITTED, **more: Any) -> Result:
    fields = {"status": status, "batch": batch.batch, "cached": job.base_len + tokens - 1} | more
    return builders.result(job.session, job.round, job.base_len, [7] * tokens, **fields)


def dispatcher(policy: str = "fcfs", *verifiers: Heartbeat, limits: BatchLimits = LIMITS, **more: Any) -> Dispatcher:
    d = Dispatcher("s1", SchedulingRules(policy, limits, **more))
    for beat in verifiers or (heartbeat(),):
        d.on_heartbeat(beat, 0.0)
        d.on_cost_model(MODEL.model_copy(update={"verifier": beat.verifier}), 0.0)
    return d


def sent(d: Dispatcher, now_ms: float) -> list[tuple[str, Batch]]:
    return d.dispatch(now_ms)[0]


def only(d: Dispatcher, now_ms: float) -> Batch:
    ((_, batch),) = sent(d, now_ms)
    return batch


def sessions(batch: Batch) -> list[str]:
    return [job.session for job in batch.jobs]


def test_a_long_prompt_is_prefilled_in_chunks_beside_short_rounds() -> None:
    d = dispatcher("fcfs", limits=BatchLimits(max_batch_ms=300.0, max_batch_tokens=2048))
    d.on_verify(verify("long", base=1000, draft=0), 0.0)
    d.on_verify(verify("short", base=20, draft=0), 1.0)
    now, seen, short_done, first_ms = 2.0, [], None, None
    while d.fleet.pending_round("long"):
        d.on_heartbeat(heartbeat(held=d.fleet.verifiers["v1"].cached), now)
        batch = only(d, now)
        assert batch.predicted_ms <= 300.0
        first_ms = first_ms or batch.predicted_ms
        now += batch.predicted_ms
        for job in batch.jobs:
            if job.session == "short":
                short_done = now
            if job.prefill_to is not None:
                seen.append(job.prefill_to)
                d.on_result(result(batch, job, tokens=0, status=Status.PREFILLED, cached=job.prefill_to), now)
            else:
                d.on_result(result(batch, job, finish=Finish.STOP), now)
    assert seen == sorted(set(seen))
    assert len(seen) > 3
    assert short_done is not None
    assert short_done == 2.0 + first_ms, "the short round must not wait for a long prompt"


def test_pending_rounds_are_sent_together() -> None:
    d = dispatcher()
    for i in range(5):
        d.on_verify(verify(f"s{i}"), float(i))
    batch = only(d, 5.0)
    assert sessions(batch) == [f"s{i}" for i in range(5)]
    assert [job.queue_ms for job in batch.jobs] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert batch.jobs[0].reason == "waited 5 ms"
    assert not d.fleet.pending_count


def test_a_round_sent_again_is_verified_once() -> None:
    d = dispatcher()
    d.on_verify(verify("s"), 0.0)
    d.on_verify(verify("s"), 1.0)
    batch = only(d, 2.0)
    assert len(batch.jobs) == 1
    d.on_verify(verify("s"), 3.0)
    assert not d.fleet.pending_count
    d.on_result(result(batch, batch.jobs[0]), 50.0)
    d.on_verify(verify("s", round_=1, base=21), 55.0)
    assert d.fleet.pending_count == 1


def test_a_second_drafter_gets_the_result_of_the_same_round() -> None:
    d = dispatcher()
    d.on_verify(verify("s"), 0.0)
    first = only(d, 0.0)
    d.on_verify(verify("s").model_copy(update={"drafter": "d2"}), 1.0)
    d.on_result(result(first, first.jobs[0]), 50.0)
    assert [job.drafter for job in only(d, 60.0).jobs] == ["d2"]


def test_a_session_stays_at_the_verifier_with_its_kv() -> None:
    d = dispatcher("fcfs", heartbeat("v1"), heartbeat("v2", held={"s": 19}), heartbeat("v3", held={"s": 3}))
    d.on_verify(verify("s"), 0.0)
    assert [name for name, _ in sent(d, 1.0)] == ["v2"]


def test_new_sessions_are_spread_over_the_verifiers() -> None:
    d = dispatcher("fcfs", heartbeat("v1", held={"old1": 5, "old2": 5}), heartbeat("v2"))
    for i in range(6):
        d.on_verify(verify(f"s{i}"), 0.0)
    counts = {name: len(batch.jobs) for name, batch in sent(d, 1.0)}
    assert counts == {"v1": 2, "v2": 4}


def test_a_session_of_another_model_goes_to_a_verifier_that_serves_it() -> None:
    d = dispatcher("fcfs", heartbeat("v1", fingerprint="other"), heartbeat("v2"))
    for i in range(3):
        d.on_verify(verify(f"s{i}"), 0.0)
    assert {name for name, _ in sent(d, 1.0)} == {"v2"}


def test_a_draining_verifier_gets_nothing_and_its_sessions_move() -> None:
    d = dispatcher("fcfs", heartbeat("v1", held={"s": 19}, draining=True), heartbeat("v2"))
    d.on_verify(verify("s"), 0.0)
    assert [name for name, _ in sent(d, 1.0)] == ["v2"]


@pytest.mark.parametrize("how", ["silent", "returned"])
def test_the_jobs_of_a_lost_verifier_go_to_another(how: str) -> None:
    d = dispatcher("fcfs", heartbeat("v1", held={"s": 19}))
    d.on_verify(verify("s"), 0.0)
    ((name, _),) = sent(d, 0.0)
    assert name == "v1"
    if how == "returned":
        d.on_returned("v1", SILENT_MS)
    d.on_heartbeat(heartbeat("v2"), SILENT_MS + 1)
    assert [(name, sessions(batch)) for name, batch in sent(d, SILENT_MS + 1)] == [("v2", ["s"])]


def test_a_batch_that_never_answers_is_given_up() -> None:
    d = dispatcher()
    d.on_verify(verify("s"), 0.0)
    first = only(d, 0.0)
    for now in range(0, 6000, 500):
        d.on_heartbeat(heartbeat(), float(now))
    late = LOST_FACTOR * first.predicted_ms + LOST_SLACK_MS + 1
    d.on_heartbeat(heartbeat(), late)
    assert sessions(only(d, late)) == ["s"]


def test_rounds_wait_for_a_verifier_unless_they_are_cancelled() -> None:
    d = Dispatcher("s1", SchedulingRules("fcfs", LIMITS))
    d.on_verify(verify("a"), 0.0)
    d.on_verify(verify("b"), 0.0)
    assert sent(d, 1.0) == []
    d.on_cancel("b")
    d.on_heartbeat(heartbeat(), 2.0)
    assert sessions(only(d, 3.0)) == ["a"]


def test_ended_and_failed_sessions_leave_nothing_behind() -> None:
    d = dispatcher()
    for name in ("ends", "fails"):
        d.on_verify(verify(name), 0.0)
    batch = only(d, 0.0)
    d.on_result(result(batch, batch.jobs[0], finish=Finish.STOP), 50.0)
    d.on_result(result(batch, batch.jobs[1], tokens=0, status=Status.FAILED), 50.0)
    state = d.fleet.verifiers["v1"]
    assert (d.fleet.pending_count, d.fleet.sessions, state.cached, state.returning, state.in_flight) == (
        0,
        {},
        {},
        {},
        [],
    )
    assert state.sessions == {}


def ping_pong(d: Dispatcher, count: int, return_ms: float, rounds: int) -> list[int]:
    """Return the sizes of the batches of sessions that come back a fixed time after each result."""
    arrivals = [(0.3 * i, f"s{i:02}", 0) for i in range(count)]
    running: list[tuple[float, Batch]] = []
    sizes: list[int] = []
    now = 0.0
    while len(sizes) < rounds:
        for at, name, round_ in [a for a in arrivals if a[0] <= now]:
            arrivals.remove((at, name, round_))
            d.on_verify(verify(name, round_=round_, base=20 + round_, draft=0), now)
        if running and running[0][0] <= now:
            _, batch = running.pop(0)
            if running:
                running[0] = (now + running[0][1].predicted_ms, running[0][1])
            for job in batch.jobs:
                d.on_result(result(batch, job), now)
                arrivals.append((now + return_ms, job.session, job.round + 1))
        d.on_heartbeat(heartbeat(held=d.fleet.verifiers["v1"].cached), now)
        for _, batch in d.dispatch(now)[0]:
            sizes.append(len(batch.jobs))
            running.append((now + batch.predicted_ms, batch))
        now += 0.5
    return sizes


def test_sessions_that_come_back_together_are_verified_together() -> None:
    """Sessions that arrive one by one end up in shared batches instead of taking turns."""
    sizes = ping_pong(dispatcher(), count=8, return_ms=3.0, rounds=20)
    assert sizes[0] < 8
    assert sizes[-5:] == [8] * 5


def test_a_verifier_does_not_wait_for_sessions_that_are_far_away() -> None:
    d = dispatcher()
    for name in ("a", "b"):
        d.on_verify(verify(name), 0.0)
    batch = only(d, 0.0)
    for job in batch.jobs:
        d.on_result(result(batch, job), 50.0)
    d.on_verify(verify("a", round_=1, base=21), 150.0)
    d.on_heartbeat(heartbeat(), 150.0)
    assert sessions(only(d, 150.0)) == ["a"]
    assert d.return_ms("d") > pacing.GATHER_SHARE * cost.fixed_ms(MODEL)


def test_a_batch_is_prepared_early_only_if_waiting_cannot_improve_it() -> None:
    near = dispatcher()
    near.on_verify(verify("a"), 0.0)
    running = only(near, 0.0)
    near.on_verify(verify("b"), 1.0)
    assert near.dispatch(running.predicted_ms) == ([], None), "a is about to come back and can share b's batch"

    full = dispatcher("fcfs", limits=BatchLimits(400.0, 64))
    for i in range(30):
        full.on_verify(verify(f"s{i:02}", base=2, draft=3), 0.0)
    first = only(full, 0.0)
    batches, wake = full.dispatch(1.0)
    assert batches == []
    assert wake is not None
    assert 1.0 < wake < first.predicted_ms
    second = only(full, wake)
    assert len(full.fleet.verifiers["v1"].in_flight) == 2
    assert full.dispatch(wake + 1)[0] == [], "never more than one in flight and one prepared"
    assert set(sessions(first)).isdisjoint(sessions(second))


def test_a_job_passes_on_the_fields_of_its_round() -> None:
    fields = {"tpot_ms": 70.0, "service_class": "priority", "draft_ms": 3.0, "session_key": "ab", "hidden_from": 2}
    fields |= {"grouped": True}
    sent_round = verify("s", round_=5, slack=400.0).model_copy(
        update=fields | {"hidden_format": HiddenFormat.INT8, "drafter": "d7", "gateway": "g7"}
    )
    d = dispatcher()
    d.on_verify(sent_round, 0.0)
    (job,) = only(d, 3.0).jobs
    passed_on = {name for name in RoundFields.model_fields if getattr(job, name) == getattr(sent_round, name)}
    assert set(RoundFields.model_fields) - passed_on == {"slack_ms"}
    assert job.slack_ms == 397.0
    defaults = {name for name, field in RoundFields.model_fields.items() if getattr(job, name) == field.default}
    assert defaults == set(), "every field was changed from its default"


def test_a_job_asks_for_hidden_states_as_its_round_but_a_chunk_does_not() -> None:
    d = dispatcher()
    asks = {"hidden_from": 3, "hidden_format": HiddenFormat.INT8}
    d.on_verify(verify("asks").model_copy(update=asks), 0.0)
    d.on_verify(verify("long", base=1000).model_copy(update=asks), 1.0)
    d.on_verify(verify("quiet"), 2.0)
    jobs = {job.session: job for job in only(d, 3.0).jobs}
    assert (jobs["asks"].hidden_from, jobs["asks"].hidden_format) == (3, HiddenFormat.INT8)
    assert jobs["long"].prefill_to is not None
    assert jobs["long"].hidden_from is None
    assert jobs["quiet"].hidden_from is None


def test_every_policy_serves_every_round_of_a_crowd() -> None:
    for policy in POLICIES:
        d = dispatcher(policy, limits=BatchLimits(800.0, 2048))
        rng = random.Random(7)
        for i in range(200):
            d.on_verify(verify(f"s{i}", base=rng.randint(2, 900), slack=rng.choice([None, 50.0, 5000.0])), float(i))
        now, served = 200.0, 0
        while d.fleet.pending_count or d.fleet.verifiers["v1"].in_flight:
            d.on_heartbeat(heartbeat(held=d.fleet.verifiers["v1"].cached), now)
            for _, batch in d.dispatch(now)[0]:
                for job in batch.jobs:
                    if job.prefill_to is not None:
                        d.on_result(result(batch, job, tokens=0, status=Status.PREFILLED, cached=job.prefill_to), now)
                    else:
                        served += 1
                        d.on_result(result(batch, job, finish=Finish.LENGTH), now)
            now += 50.0
            assert now < 60_000
        assert served == 200


def fast(name: str) -> CostModel:
    return MODEL.model_copy(update={"verifier": name, "coefficients": [c / 4 for c in MODEL.coefficients]})


def test_a_verifier_that_is_four_times_as_fast_gets_more_sessions() -> None:
    d = dispatcher("wisp", heartbeat("slow"), heartbeat("fast"))
    d.on_cost_model(fast("fast"), 0.0)
    for i in range(20):
        d.on_verify(verify(f"s{i}"), 0.0)
    counts = {name: len(batch.jobs) for name, batch in sent(d, 1.0)}
    assert counts["fast"] > 2 * counts["slow"] > 0


def test_a_verifier_without_free_cache_gets_no_new_session() -> None:
    d = dispatcher("wisp", heartbeat("v1", free=10), heartbeat("v2", held={f"old{i}": 5 for i in range(9)}))
    d.on_verify(verify("s", base=300), 0.0)
    assert [name for name, _ in sent(d, 1.0)] == ["v2"]


def crowded(policy: str, **more: Any) -> Dispatcher:
    """A dispatcher with thirty short sessions on v1, and v2 idle."""
    d = dispatcher(policy, heartbeat("v1", held={f"s{i:02}": 19 for i in range(30)}), **more)
    for i in range(30):
        d.on_verify(verify(f"s{i:02}"), 0.0)
    d.on_heartbeat(heartbeat("v2"), 0.0)
    d.on_cost_model(MODEL.model_copy(update={"verifier": "v2"}), 0.0)
    return d


def test_wisp_plus_moves_sessions_to_an_idle_verifier_if_that_pays() -> None:
    def next_rounds(d: Dispatcher) -> dict[str, int]:
        for name, batch in sent(d, 1.0):
            for job in batch.jobs:
                d.on_result(result(batch, job, verifier=name), 2.0)
        for i in range(30):
            d.on_verify(verify(f"s{i:02}", round_=1, base=21), 3.0)
        return {name: len(batch.jobs) for name, batch in sent(d, 100.0)}

    assert set(next_rounds(crowded("wisp"))) == {"v1"}
    assert set(next_rounds(crowded("wisp+", options=PolicyOptions(without=frozenset({"migration"}))))) == {"v1"}
    moved = next_rounds(crowded("wisp+"))
    assert moved["v2"] > 5


def test_prompts_do_not_drive_away_a_session_with_kv() -> None:
    """A round does not wait behind them: the next step has room for both."""
    d = dispatcher("wisp+", heartbeat("v1", held={"s": 409}), heartbeat("v2"))
    d.on_heartbeat(heartbeat("v2", draining=True), 0.0)
    for i in range(8):
        d.on_verify(verify(f"prompt-{i}", base=1500, draft=0, slack=8000.0), 0.0)
    d.fleet.verifiers["v2"].heartbeat = heartbeat("v2")  # it is back, and has taken no prompt yet
    assert d.fleet.queues["v1"].work_ms > 4000
    assert not d.fleet.queues["v2"]
    d.on_verify(verify("s", round_=5, base=410, slack=100.0), 0.0)
    assert "s" in d.fleet.queues["v1"].rounds


def test_a_round_goes_out_once_beside_a_chunk_on_another_verifier() -> None:
    d = dispatcher("wisp+", heartbeat("v1"), heartbeat("v2"))
    d.on_heartbeat(heartbeat("v1", draining=True), 0.0)
    d.on_verify(verify("s", base=410, slack=300.0), 0.0)
    chunk = d.fleet.queues["v2"].rounds["s"]
    state = d.fleet.verifiers["v2"]
    state.in_flight.append(InFlight("chunk", {"s": chunk.pending}, 0.0, 40.0, {"s": 256}))
    d.on_heartbeat(heartbeat("v1", held={"s": 409}), 0.0)
    d.fleet.remove("s")
    d.fleet.add(chunk.pending, 0.0)
    ((name, batch),) = sent(d, 1.0)
    assert (name, len(batch.jobs)) == ("v1", 1)
    prefilled = builders.result(
        "s", 0, 410, [], batch="chunk", verifier="v2", status=Status.PREFILLED, cached=256, new_tokens=256
    )
    d.on_result(prefilled, 40.0)
    assert d.fleet.pending_round("s") is None
    assert sent(d, 41.0) == []


def test_a_verifier_gets_one_release_for_a_session_that_has_left() -> None:
    for finish in (None, Finish.STOP):
        d = dispatcher("wisp+", heartbeat("v1"), heartbeat("v2", held={"s": 19, "stays": 19}))
        d.fleet.verifiers["v1"].cached["s"] = 10
        for name in ("s", "stays"):
            d.on_verify(verify(name), 0.0)
        ((name, batch),) = sent(d, 1.0)
        assert name == "v2"
        for job in batch.jobs:
            d.on_result(result(batch, job, verifier="v2", finish=finish), 50.0)
        assert d.releases() == {"v1": ["s"]}
        assert d.releases() == {}


def test_a_long_session_is_not_moved_for_a_small_gain() -> None:
    held = {"long": 1999, **{f"s{i}": 19 for i in range(3)}}
    d = dispatcher("wisp+", heartbeat("v1", held=held), heartbeat("v2"))
    d.on_verify(verify("long", base=2000), 0.0)
    assert [name for name, _ in sent(d, 1.0)] == ["v1"]


def test_a_trimmed_draft_counts_as_drafted_but_not_as_verified() -> None:
    d = dispatcher("wisp+")
    trimmed = verify("s", draft=6).model_copy(update={"acceptance": [0.9, 0.9, 0.01, 0.9, 0.9, 0.9]})
    d.on_verify(trimmed, 0.0)
    (job,) = only(d, 1.0).jobs
    assert (len(job.draft), job.drafted) == (2, 6)
    assert job.reason.endswith("2 of 6 draft tokens")


def test_a_draft_beyond_the_cap_is_cut() -> None:
    d = dispatcher("fcfs", max_draft=3)
    d.on_verify(verify("s", draft=50), 0.0)
    (job,) = only(d, 1.0).jobs
    assert (len(job.draft), job.drafted) == (3, 50)


def test_a_draft_without_acceptance_predictions_is_served() -> None:
    d = dispatcher("wisp+")
    d.on_verify(verify("s", draft=4).model_copy(update={"acceptance": []}), 0.0)
    assert sessions(only(d, 1.0)) == ["s"]


def test_sled_waits_until_a_batch_is_full_or_its_fill_time_is_over() -> None:
    d = dispatcher("sled", options=PolicyOptions(3, 50.0))
    d.on_verify(verify("a"), 0.0)
    d.on_verify(verify("b"), 20.0)
    assert d.dispatch(30.0) == ([], 50.0)
    first = only(d, 50.0)
    assert sessions(first) == ["a", "b"]
    for i in range(4):
        d.on_verify(verify(f"c{i}"), 60.0)
    assert sent(d, 70.0) == [], "one batch at a time"
    for job in first.jobs:
        d.on_result(result(first, job, finish=Finish.STOP), 80.0)
    assert sessions(only(d, 80.0)) == ["c0", "c1", "c2"]


def promised(session: str, tpot_ms: float | None, name: str = "default", slack: float | None = 500.0) -> Verify:
    return verify(session, slack=slack).model_copy(update={"tpot_ms": tpot_ms, "service_class": name})


WITHOUT_RUNS = PolicyOptions(without=frozenset({"runs"}))


def test_the_utilization_is_the_promised_share_of_the_time() -> None:
    d = dispatcher("wisp+", options=WITHOUT_RUNS)
    assert d.load(0.0).utilization == 0.0
    d.on_verify(promised("a", 100.0, "priority"), 0.0)
    one = d.load(1.0)
    d.on_verify(promised("b", 100.0, "flex"), 1.0)
    two = d.load(2.0)
    d.on_verify(promised("c", None, "flex", None), 1.0)
    free = d.load(2.0)
    assert one.utilization == pytest.approx(1.5 * one.fixed_ms / 100 + one.round_ms / 100)
    assert two.utilization == pytest.approx(one.utilization + one.round_ms / 100)
    assert free.utilization == pytest.approx(two.utilization), "a session without an SLO is promised nothing"
    assert (two.period_ms, two.verifiers, two.pending) == (pytest.approx(100 / 1.5), 1, 2)
    classes = {c.service_class: c for c in free.classes}
    assert (classes["flex"].sessions, classes["flex"].waiting, classes["flex"].slack_ms) == (2, 2, 499.0)
    assert free.backlog_ms > two.backlog_ms > 0
    d.on_cancel("b")
    assert d.load(3.0).utilization == pytest.approx(one.utilization)


def test_an_slo_that_no_verifier_can_meet_counts_for_nothing() -> None:
    d = dispatcher("wisp+", options=WITHOUT_RUNS)
    d.on_verify(promised("hopeless", 1.0), 0.0)
    assert (d.load(1.0).utilization, d.load(1.0).period_ms) == (0.0, None)
    d.on_verify(promised("a", 100.0), 1.0)
    load = d.load(2.0)
    assert load.utilization == pytest.approx((1.5 * load.fixed_ms + load.round_ms) / 100)
    assert load.period_ms == pytest.approx(100 / 1.5)


def test_time_for_drafting_and_messages_shortens_the_needed_period() -> None:
    d = dispatcher("wisp+", options=WITHOUT_RUNS)
    base, now = 10, 0.0
    for number in range(20):
        d.on_verify(promised("a", 100.0).model_copy(update={"round": number, "base_len": base}), now)
        batch = only(d, now)
        (job,) = batch.jobs
        done = result(batch, job)
        d.on_result(done.model_copy(update={"queue_ms": 0.0, "verify_ms": 8.0}), now + 10.0)
        base += len(done.tokens)
        now += 10.0 + 30.0
    load = d.load(now)
    # 30 ms pass between a result and the next round; 2 of the 10 ms until the next result are for messages.
    assert load.away_ms == pytest.approx(32.0)
    round_period_ms = 100.0 * load.tokens_per_round
    assert load.period_ms == pytest.approx((round_period_ms - 32.0) / 1.5)


def test_a_stall_hardly_changes_the_expected_time_between_rounds() -> None:
    session, now = ActiveSession("default", 100.0), 0.0
    for away in (None, 30.0, 30.0):
        assert session.record_result(now, 10.0, 2) == away
        now += 40.0
    assert session.record_result(now + 3000.0, 10.0, 2) is None, "an outage of one session does not count for others"
    assert session.away_ms == pytest.approx(30.0 + 0.2 * 90.0)
    for _ in range(20):
        now += 10_000.0
        session.record_result(now, 10.0, 2)
    assert (session.away_ms or 0.0) > 5000.0, "a device that stays slow counts as slow"


def test_prompts_count_as_load_for_a_while() -> None:
    d = dispatcher("wisp+")
    d.on_verify(verify("s", base=200, draft=0), 0.0)
    batch = only(d, 0.0)
    (job,) = batch.jobs
    d.on_result(result(batch, job, new_tokens=200), 400.0)
    assert 0.02 < d.load(500.0).utilization < 0.2
    d.on_heartbeat(heartbeat(), 100_000.0)
    assert d.load(100_000.0).utilization < 0.001


def test_the_load_forgets_how_long_rounds_waited_once_none_is_sent() -> None:
    d = dispatcher("fcfs")
    for round_ in range(2):
        d.on_verify(verify("s", round_=round_, base=20 + round_), 100.0 * round_)
        batch = only(d, 100.0 * round_ + 94.0)
        d.on_result(result(batch, batch.jobs[0]), 100.0 * round_ + 99.0)
    busy, idle = d.load(1000.0), d.load(60_000.0)
    assert busy.queue_ms > 9.0
    assert [one.queue_ms for one in busy.classes] == [94.0]
    assert (idle.pending, idle.queue_ms) == (0, 0.0)
    assert [one.queue_ms for one in idle.classes] == [0.0], "the session is away, and its class is still known"


def test_the_price_of_a_token_grows_with_the_rounds_of_the_batch() -> None:
    assert load_with(1).price_ms == 0.0
    assert load_with(12).price_ms > 2 * load_with(4).price_ms > 0
    assert load_with(12, "wisp").price_ms == 0.0


def load_with(sessions: int, policy: str = "wisp+") -> Load:
    """The load after some batches of this many sessions."""
    d = dispatcher(policy)
    for round_ in range(30):
        now = 100.0 * round_
        d.on_heartbeat(heartbeat(held=d.fleet.verifiers["v1"].cached), now)
        for i in range(sessions):
            d.on_verify(verify(f"s{i}", round_=round_, base=20 + round_), now)
        for _, batch in sent(d, now):
            for job in batch.jobs:
                d.on_result(result(batch, job), now + 50.0)
    return d.load(3000.0)


def test_the_load_has_the_predicted_times_of_every_draft_length() -> None:
    alone, shared = load_with(1).verify_ms, load_with(12).verify_ms
    assert len(alone) == len(shared) == dispatcher().rules.max_draft + 1
    assert alone == sorted(alone)
    model = dispatcher().fleet.verifiers["v1"].model
    assert alone[4] == pytest.approx(cost.predict_ms(model, cost.shape_of([(5, 60, 5)])), rel=0.2)
    assert shared[0] > alone[0]
    assert shared[4] - shared[0] == pytest.approx(4 * cost.token_ms(model), rel=0.05), "past the knee of the batch"


def test_without_a_verifier_the_load_predicts_no_times() -> None:
    assert Dispatcher("s", SchedulingRules("wisp+", LIMITS)).load(0.0).verify_ms == []


def test_a_batch_carries_slack_class_and_left_out_rounds() -> None:
    d = dispatcher("wisp", limits=BatchLimits(100.0, 2048))
    for i in range(30):
        d.on_verify(promised(f"s{i:02}", 100.0, "priority", 900.0), 0.0)
    batch = only(d, 5.0)
    assert {(job.service_class, job.slack_ms) for job in batch.jobs} == {("priority", 895.0)}
    assert batch.waiting == 30 - len(batch.jobs) > 0
    assert batch.left_out
    assert "100" in batch.left_out[0].reason


def test_a_session_of_a_silent_drafter_is_forgotten() -> None:
    d = dispatcher("wisp+")
    d.on_verify(promised("s", 100.0), 0.0)
    batch = only(d, 0.0)
    d.on_result(result(batch, batch.jobs[0]), 50.0)
    assert d.load(1000.0).classes
    d.on_heartbeat(heartbeat(), FORGOTTEN_MS + 51)
    assert d.load(FORGOTTEN_MS + 51).classes == []
    assert d.fleet.verifiers["v1"].sessions == {}


def test_a_session_is_in_one_batch_at_a_time_whatever_happens() -> None:
    for policy in POLICIES:
        rng = random.Random(3)
        d = dispatcher(policy, heartbeat("v1"), heartbeat("v2"))
        rounds = {f"s{i}": 0 for i in range(25)}
        flying: list[tuple[str, Batch]] = []
        for step in range(600):
            now = step * 10.0
            name = rng.choice(sorted(rounds))
            busy = {job.session for _, batch in flying for job in batch.jobs}
            if name not in busy:
                copy = verify(name, round_=rounds[name], base=20 + rounds[name], slack=rng.choice([None, 10.0, 900.0]))
                for _ in range(rng.choice([1, 1, 2])):
                    d.on_verify(copy, now)
            for verifier in ("v1", "v2"):
                d.on_heartbeat(heartbeat(verifier, held=d.fleet.verifiers[verifier].cached), now)
            flying += sent(d, now)
            jobs = [job.session for _, batch in flying for job in batch.jobs]
            assert len(jobs) == len(set(jobs)), policy
            if flying and rng.random() < 0.5:
                verifier, batch = flying.pop(0)
                for job in batch.jobs:
                    d.on_result(result(batch, job, verifier=verifier), now)
                    rounds[job.session] += 1
        assert max(rounds.values()) > 5


def test_a_new_session_counts_on_less_than_the_mean_if_sessions_differ() -> None:
    d = dispatcher("wisp+")

    def text(session: str, tokens: int, now: float) -> None:
        base = 10
        for number in range(8):
            d.on_verify(promised(session, 100.0).model_copy(update={"round": number, "base_len": base}), now)
            batch = only(d, now)
            finish = Finish.STOP if number == 7 else None
            d.on_result(result(batch, batch.jobs[0], tokens=tokens, finish=finish), now)
            base += tokens

    for number in range(40):
        text(f"alike-{number}", 2, number * 10.0)
    alike = d.load(500.0).tokens_per_round
    for number in range(20):
        text(f"unlike-{number}", 1 + 2 * (number % 2), 500.0 + number * 10.0)
    assert alike == pytest.approx(2.0, abs=0.1)
    assert 1.0 <= d.load(900.0).tokens_per_round < alike - 0.1


def test_a_batch_carries_the_lease_of_its_verifier() -> None:
    d = Dispatcher("d", SchedulingRules("fcfs", LIMITS))
    d.on_heartbeat(heartbeat(lease=7), 0)
    d.on_verify(verify("s"), 0)
    ((_, batch),) = sent(d, 0)
    assert batch.lease == 7


def test_rounds_of_an_ended_lease_are_sent_again_under_the_new_one() -> None:
    d = dispatcher("fcfs", heartbeat(lease=7))
    for session in ("s", "t"):
        d.on_verify(verify(session), 0.0)
    before = only(d, 0.0)
    runs = d.fleet.verifiers["v1"].runs
    runs.set("r", RunningRun(20, "d", 0.0))
    d.on_heartbeat(heartbeat(lease=7), 100.0)
    assert not sent(d, 100.0)
    assert "r" in runs
    d.on_heartbeat(heartbeat(lease=8), 200.0)
    assert not runs
    after = only(d, 200.0)
    assert (before.lease, after.lease) == (7, 8)
    assert sessions(after) == sessions(before)
    for job in after.jobs:
        d.on_result(result(after, job), 300.0)
    assert not d.fleet.pending_count


def test_a_first_lease_ends_none() -> None:
    d = dispatcher("fcfs", heartbeat())
    d.on_verify(verify("s"), 0.0)
    only(d, 0.0)
    d.on_heartbeat(heartbeat(lease=8), 100.0)
    assert not sent(d, 100.0)


def test_verifiers_and_batches_are_not_lost_in_a_pause_of_the_scheduler() -> None:
    d = dispatcher("fcfs", heartbeat("v1"), heartbeat("v2"))
    d.on_verify(verify("s"), 0.0)
    name, batch = sent(d, 0.0)[0]
    d.on_pause(40_000.0)
    assert not sent(d, 40_000.0)
    assert set(d.fleet.verifiers) == {"v1", "v2"}
    d.on_result(result(batch, batch.jobs[0], verifier=name), 40_010.0)
    assert not d.fleet.pending_count
    assert not sent(d, 40_000.0 + SILENT_MS + 1)
    assert not d.fleet.verifiers, "silence after the pause counts"
