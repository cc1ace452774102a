"""The scheduler's decisions: order, batches within limits, placement, pacing, repair. No clock, no broker."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler import pacing
from services.scheduler.batching import CHUNK, Limits, fill
from services.scheduler.dispatch import LOST_FACTOR, LOST_SLACK_MS, SILENT_MS, Dispatcher
from services.scheduler.policies import POLICIES, edf, fcfs
from services.scheduler.pool import Pending, VerifierState
from shared import cost
from shared.messages import Batch, CostModel, Finish, Heartbeat, HiddenFormat, Job, Residency, Result, Status, Verify

MODEL = CostModel(
    verifier="v1",
    coefficients=[40.0, 1.0, 2.0, 5.0, 5.0],
    ratio_p50=1.0,
    ratio_p90=1.1,
    ratio_p99=1.3,
    samples=9,
    version=1,
)
LIMITS = Limits(max_batch_ms=400.0, max_batch_tokens=2048)


def verify(session: str, *, round_: int = 0, base: int = 20, draft: int = 4, slack: float | None = None) -> Verify:
    return Verify(
        session=session,
        round=round_,
        base_len=base,
        draft=[1] * draft,
        acceptance=[0.5] * draft,
        drafter="d",
        gateway="g",
        fingerprint="f",
        slack_ms=slack,
    )


def heartbeat(name: str = "v1", *, held: dict[str, int] | None = None, free: int = 10_000, **more: object) -> Heartbeat:
    residency = [Residency(session=s, cached=c) for s, c in (held or {}).items()]
    return Heartbeat.model_validate(
        {"verifier": name, "fingerprint": "f", "max_len": 8192, "free_tokens": free, "total_tokens": 10_000}
        | {"residency": residency}
        | more
    )


def result(batch: Batch, job: Job, *, tokens: int = 1, status: Status = Status.COMMITTED, **more: object) -> Result:
    return Result.model_validate(
        {"session": job.session, "round": job.round, "base_len": job.base_len, "status": status, "verifier": "v1"}
        | {"batch": batch.batch, "tokens": [7] * tokens, "cached": job.base_len + tokens - 1}
        | more
    )


def dispatcher(policy: str = "fcfs", *verifiers: Heartbeat, limits: Limits = LIMITS) -> Dispatcher:
    d = Dispatcher("s1", policy, limits, max_draft=16)
    for beat in verifiers or (heartbeat(),):
        d.on_heartbeat(beat, 0.0)
        d.on_cost_model(MODEL.model_copy(update={"verifier": beat.verifier}))
    return d


def sent(d: Dispatcher, now_ms: float) -> list[tuple[str, Batch]]:
    return d.dispatch(now_ms)[0]


def only(d: Dispatcher, now_ms: float) -> Batch:
    ((_, batch),) = sent(d, now_ms)
    return batch


def sessions(batch: Batch) -> list[str]:
    return [job.session for job in batch.jobs]


def pending(name: str, arrived: float, due: float | None, **shape: int) -> Pending:
    return Pending(verify(name, **shape), arrived, due)


def test_fcfs_takes_rounds_in_order_of_arrival() -> None:
    queue = [pending("b", 2.0, 5.0), pending("a", 1.0, None), pending("c", 3.0, 1.0)]
    assert [p.session for p, _ in fcfs(queue, 10.0)] == ["a", "b", "c"]


def test_edf_takes_the_earliest_deadline_first_and_rounds_without_slo_last() -> None:
    queue = [pending("late", 1.0, 900.0), pending("none", 0.0, None), pending("urgent", 3.0, 100.0)]
    assert [(p.session, why) for p, why in edf(queue, 50.0)] == [
        ("urgent", "due in 50 ms"),
        ("late", "due in 850 ms"),
        ("none", "no SLO"),
    ]


queues = st.lists(
    st.builds(
        pending,
        st.uuids().map(lambda u: u.hex),
        st.floats(0, 1000),
        st.none() | st.floats(-500, 5000),
        base=st.integers(1, 3000),
        draft=st.integers(0, 16),
    ),
    min_size=1,
    max_size=40,
)


@given(queues, st.sampled_from(sorted(POLICIES)), st.randoms())
def test_the_order_of_arrival_at_the_function_does_not_matter(
    queue: list[Pending], policy: str, rng: random.Random
) -> None:
    shuffled = list(queue)
    rng.shuffle(shuffled)
    order = POLICIES[policy]
    assert [p.session for p, _ in order(queue, 10.0)] == [p.session for p, _ in order(shuffled, 10.0)]


@settings(max_examples=200)
@given(
    queues,
    st.sampled_from(sorted(POLICIES)),
    st.floats(45, 2000),
    st.integers(CHUNK, 4096),
    st.dictionaries(st.integers(0, 39), st.integers(0, 3000)),
)
def test_a_batch_stays_within_its_limits_and_always_moves_the_first_round_on(
    queue: list[Pending], policy: str, max_ms: float, max_tokens: int, held: dict[int, int]
) -> None:
    cached = {queue[i].session: min(c, queue[i].verify.base_len) for i, c in held.items() if i < len(queue)}
    verifier = VerifierState(heartbeat(), 0.0, MODEL, cached)
    ordered = POLICIES[policy](queue, 10.0)
    plan = fill(ordered, verifier, Limits(max_ms, max_tokens))
    names = [c.pending.session for c in plan.chosen]
    assert len(set(names)) == len(names)
    assert ordered[0][0].session in names
    assert plan.predicted_ms == pytest.approx(cost.predict_ms(MODEL, plan.shape))
    for c in plan.chosen:
        start = c.pending.held(cached.get(c.pending.session, 0))
        if c.prefill_to is not None:
            assert start < c.prefill_to < c.pending.verify.base_len
            assert c.prefill_to % CHUNK == 0
    if len(plan.chosen) > 1:
        assert plan.predicted_ms <= max_ms
        assert plan.shape.new_tokens <= max_tokens
    whole = sum(1 for c in plan.chosen if c.prefill_to is None)
    assert plan.full == (whole < len(queue))


def test_a_long_prompt_is_prefilled_in_chunks_beside_short_rounds() -> None:
    d = dispatcher("fcfs", limits=Limits(max_batch_ms=300.0, max_batch_tokens=2048))
    d.on_verify(verify("long", base=1000, draft=0), 0.0)
    d.on_verify(verify("short", base=20, draft=0), 1.0)
    now, seen, short_done, first_ms = 2.0, [], None, None
    while "long" in d.pool:
        d.on_heartbeat(heartbeat(held=d.verifiers["v1"].cached), now)
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


def test_what_waits_goes_out_together() -> None:
    d = dispatcher()
    for i in range(5):
        d.on_verify(verify(f"s{i}"), float(i))
    batch = only(d, 5.0)
    assert sessions(batch) == [f"s{i}" for i in range(5)]
    assert [job.queue_ms for job in batch.jobs] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert batch.jobs[0].reason == "waited 5 ms"
    assert not d.pool


def test_a_round_sent_again_is_verified_once() -> None:
    d = dispatcher()
    d.on_verify(verify("s"), 0.0)
    d.on_verify(verify("s"), 1.0)
    batch = only(d, 2.0)
    assert len(batch.jobs) == 1
    d.on_verify(verify("s"), 3.0)
    assert not d.pool
    d.on_result(result(batch, batch.jobs[0]), 50.0)
    d.on_verify(verify("s", round_=1, base=21), 55.0)
    assert len(d.pool) == 1


def test_the_same_round_from_a_second_drafter_is_answered_to_that_one() -> None:
    d = dispatcher()
    d.on_verify(verify("s"), 0.0)
    first = only(d, 0.0)
    d.on_verify(verify("s").model_copy(update={"drafter": "d2"}), 1.0)
    d.on_result(result(first, first.jobs[0]), 50.0)
    assert [job.drafter for job in only(d, 60.0).jobs] == ["d2"]


def test_a_session_stays_where_its_kv_is() -> None:
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
        d.on_returned("v1")
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


def test_without_a_verifier_rounds_wait_and_a_cancelled_one_does_not() -> None:
    d = Dispatcher("s1", "fcfs", LIMITS, max_draft=16)
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
    state = d.verifiers["v1"]
    assert (d.pool, state.cached, state.returning, state.in_flight) == ({}, {}, {}, [])


def ping_pong(d: Dispatcher, count: int, return_ms: float, rounds: int) -> list[int]:
    """Sessions that come back a fixed time after each result; returns the sizes of the batches."""
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
        d.on_heartbeat(heartbeat(held=d.verifiers["v1"].cached), now)
        for _, batch in d.dispatch(now)[0]:
            sizes.append(len(batch.jobs))
            running.append((now + batch.predicted_ms, batch))
        now += 0.5
    return sizes


def test_sessions_that_come_back_together_are_verified_together() -> None:
    """Sent one by one at first, sessions must end up sharing batches instead of taking turns."""
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
    assert d.return_ms("d") > pacing.GATHER_SHARE * MODEL.coefficients[0]


def test_a_batch_is_prepared_behind_another_only_when_waiting_cannot_make_it_better() -> None:
    near = dispatcher()
    near.on_verify(verify("a"), 0.0)
    only(near, 0.0)
    near.on_verify(verify("b"), 1.0)
    assert near.dispatch(40.0) == ([], None), "a is about to come back and can share b's batch"

    full = dispatcher("fcfs", limits=Limits(400.0, 64))
    for i in range(30):
        full.on_verify(verify(f"s{i:02}", base=2, draft=3), 0.0)
    first = only(full, 0.0)
    batches, wake = full.dispatch(1.0)
    assert batches == []
    assert wake is not None
    assert 1.0 < wake < first.predicted_ms
    second = only(full, wake)
    assert len(full.verifiers["v1"].in_flight) == 2
    assert full.dispatch(wake + 1)[0] == [], "never more than one in flight and one prepared"
    assert set(sessions(first)).isdisjoint(sessions(second))


def test_what_a_drafter_wants_of_hidden_states_goes_with_its_round_but_not_with_chunks_of_its_prompt() -> None:
    d = dispatcher()
    asks = {"hidden_from": 3, "hidden_format": HiddenFormat.INT8}
    d.on_verify(verify("asks").model_copy(update=asks), 0.0)
    d.on_verify(verify("long", base=1000).model_copy(update=asks), 1.0)
    d.on_verify(verify("quiet"), 2.0)
    told = {job.session: job for job in only(d, 3.0).jobs}
    assert (told["asks"].hidden_from, told["asks"].hidden_format) == (3, HiddenFormat.INT8)
    assert told["long"].prefill_to is not None
    assert told["long"].hidden_from is None
    assert told["quiet"].hidden_from is None


def test_under_either_policy_every_round_of_a_crowd_is_served() -> None:
    for policy in sorted(POLICIES):
        d = dispatcher(policy, limits=Limits(800.0, 2048))
        rng = random.Random(7)
        for i in range(200):
            d.on_verify(verify(f"s{i}", base=rng.randint(2, 900), slack=rng.choice([None, 50.0, 5000.0])), float(i))
        now, served = 200.0, 0
        while d.pool or d.verifiers["v1"].in_flight:
            d.on_heartbeat(heartbeat(held=d.verifiers["v1"].cached), now)
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
