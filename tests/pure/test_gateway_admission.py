"""Admission: accepted and refused requests, and the time after which to retry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.admission import (
    ARRIVED_MS,
    LONGEST_RETRY_S,
    STALE_MS,
    Admission,
    Demand,
    Refusal,
    ServiceClass,
    promised,
)
from services.gateway.settings import GatewaySettings
from shared.messages import ClassLoad, Load, Slo
from shared.slo import BATCHES_PER_ROUND, least_tpot_ms, step_need

CLASSES = GatewaySettings.model_validate({}).slo_classes
SLO = Slo(ttft_ms=1000, tpot_ms=100)


def load(**fields: Any) -> Load:
    """A busy fleet of one verifier. A session of `SLO` needs a round every 200 ms, like the others, and adds 0.05."""
    reported: dict[str, Any] = {
        "scheduler": "s",
        "price_ms": 0.0,
        "queue_ms": 0.0,
        "pending": 0,
        "draft_cap": 8,
        "policy": "edf",
        "verifiers": 1,
        "utilization": 0.5,
        "fixed_ms": 40.0,
        "period_ms": 200.0 / BATCHES_PER_ROUND,
        "round_ms": 10.0,
        "tokens_per_round": 2.0,
        "prefill_ms": 1.0,
        "backlog_ms": 0.0,
        "classes": [ClassLoad(service_class="default", sessions=20, waiting=0, queue_ms=0.0)],
    }
    return Load.model_validate(reported | fields)


def admission(reported: Load | None = None, **limits: Any) -> Admission:
    made = Admission(**({"classes": CLASSES, "max_sessions": 1000, "max_backlog_ms": 30_000.0} | limits))
    if reported is not None:
        made.update(reported, 0.0)
    return made


def demand(
    service_class: str = "default", slo: Slo | None = SLO, prompts: tuple[int, ...] = (10,), elapsed_ms: float = 0.0
) -> Demand:
    return Demand(service_class, slo, prompts, elapsed_ms)


def take_all(made: Admission, asked: Demand, most: int, now_ms: float = 0.0) -> int:
    """Offer the same request repeatedly; return the number accepted before the first refusal."""
    for number in range(most):
        if made.ask(asked, now_ms) is not None:
            return number
        for prompt in asked.prompts:
            made.start(f"s{number}-{len(made._running)}", asked.service_class, asked.slo, prompt, now_ms)
    return most


def test_a_session_adds_its_rounds_and_a_shorter_period() -> None:
    reported = load(verifiers=2)
    assert promised(reported, [], []) == 0.5
    assert promised(reported, [None], []) == 0.5
    # Its period is the present one, so only its rounds add: 10 / 200 of two verifiers.
    assert promised(reported, [100.0], []) == pytest.approx(0.5 + 0.05 / 2)
    # It needs a round every 100 ms: 10 / 100, and twice as many batches with a fixed time of 40 ms.
    assert promised(reported, [50.0], []) == pytest.approx(0.5 + (0.1 + 1.5 * (0.4 - 0.2)) / 2)
    assert promised(reported, [50.0, 50.0], []) == pytest.approx(0.5 + (0.2 + 1.5 * (0.4 - 0.2)) / 2)
    assert promised(reported, [], [100.0, None]) == pytest.approx(0.5 - 0.05 / 2)
    assert promised(load(period_ms=None, utilization=0.0), [100.0], []) == pytest.approx(0.05 + 1.5 * 0.2)


def test_an_accelerator_has_room_where_a_promise_is_nearly_a_step() -> None:
    """By the time of a step, the first session would take more than the verifier has."""
    near = {"fixed_ms": 42.0, "round_ms": 0.1, "utilization": 1.26, "demand": 0.2, "tokens_per_round": 1.0}
    strict = demand("priority", Slo(ttft_ms=5000, tpot_ms=50.0))
    assert admission(load(**near)).ask(strict, 0) is not None
    accelerator = load(**near, room_tokens_per_ms=2.5)
    assert promised(accelerator, [50.0, None], []) == pytest.approx(0.2 + 1 / 50 / 2.5)
    assert promised(accelerator, [], [50.0, 50.0, None]) == pytest.approx(0.2 - 2 / 50 / 2.5)
    assert promised(accelerator, [41.0], []) == 0.2, "it could not keep this promise for a lone session"
    slow_rounds = accelerator.model_copy(update={"round_ms": 9.0, "run_own_ms": 0.1})
    assert promised(slow_rounds, [50.0], []) == promised(accelerator, [50.0], []), "a run keeps it, a round does not"
    assert take_all(admission(accelerator), strict, 200) == 100
    assert take_all(admission(accelerator), demand("flex", strict.slo), 200) == 75


def test_drafting_and_messages_leave_less_time_for_batches() -> None:
    reported = load(period_ms=None, utilization=0.0)
    away = reported.model_copy(update={"away_ms": 100.0})
    assert promised(reported, [100.0], []) == pytest.approx(10 / 200 + 40 / (200 / 1.5))
    assert promised(away, [100.0], []) == pytest.approx(10 / 200 + 40 / (100 / 1.5))
    # With less time than one batch takes, another session would break the SLO, however idle the verifier is.
    gone = reported.model_copy(
        update={
            "away_ms": 190.0,
            "utilization": 0.2,
            "classes": [ClassLoad(service_class="x", sessions=1, waiting=0, queue_ms=0)],
        }
    )
    assert promised(gone, [100.0], []) > 1
    assert admission(gone).ask(demand(), 0) is not None


def test_runs_are_admitted_as_centralized_serving_would() -> None:
    """A step takes 40 ms and 10 for each run: five of them 90 ms, of the 100 that each token may take."""
    idle = load(utilization=0.0, period_ms=None, away_ms=150.0, run_own_ms=10.0)
    assert promised(idle, [100.0], []) == pytest.approx(0.4 + 0.1)
    for service_class, most in (("flex", 4), ("default", 5), ("priority", 6)):
        assert take_all(admission(idle), demand(service_class), 100) == most
    assert take_all(admission(idle.model_copy(update={"run_own_ms": None})), demand(), 100) == 1, "rounds are away"
    full = admission(load(utilization=0.9, period_ms=100.0, run_own_ms=10.0))
    full.start("s", "default", SLO, 1, 0)
    full.answered("s")
    full.end("s", 18_000.0)
    full.update(load(utilization=0.9, period_ms=100.0, run_own_ms=10.0), 18_000.0)
    # A ninth of what is promised has to become free.
    assert refused(full, demand(), 18_000.0).retry_after_s == 2
    # A promise shorter than a step of one run needs drafts, so it is counted in rounds.
    assert promised(load(run_own_ms=10.0), [45.0], []) == promised(load(), [45.0], [])


def test_an_slo_that_a_lone_verifier_cannot_keep_counts_as_none() -> None:
    # A round is due every 50 ms and takes 40 + 10 ms: just possible. A little less time is not enough.
    assert promised(load(), [25.0], []) > 1.0
    assert promised(load(), [24.9], []) == 0.5
    assert admission(load()).ask(demand(slo=Slo(ttft_ms=1000, tpot_ms=24.9)), 0) is None
    assert admission(load()).ask(demand(slo=Slo(ttft_ms=1000, tpot_ms=25.0)), 0) is not None
    # A prompt longer than its TTFT allows is accepted: queueing is not what breaks this SLO.
    assert admission(load(backlog_ms=5000)).ask(demand(prompts=(2000,)), 0) is None
    assert admission(load(backlog_ms=5000)).ask(demand(prompts=(200,)), 0) is not None


def test_times_that_no_verifier_can_keep_are_reported_with_the_least_ones() -> None:
    def header(made: Admission, now_ms: float = 0.0, prompt: int = 10, **times: float) -> str:
        slo = Slo(**({"ttft_ms": 1000, "tpot_ms": 100} | times))
        return str(made.unreachable(demand(slo=slo, prompts=(prompt,)), now_ms))

    made = admission(load(backlog_ms=20_000.0))
    assert header(made) == header(made, tpot_ms=25.0) == "None", "what load alone breaks is refused"
    assert header(made, tpot_ms=0.01) == "best-effort; least-tpot-ms=25.0"
    assert header(made, prompt=2000) == "best-effort; least-ttft-ms=2050.0"
    assert header(made, ttft_ms=1, tpot_ms=1) == "best-effort; least-ttft-ms=60.0; least-tpot-ms=25.0"
    runs = admission(load(fixed_ms=14.03, run_own_ms=0.5, round_ms=20.0))
    assert header(runs, tpot_ms=14.6) == "None", "a run keeps it"
    assert header(runs, tpot_ms=14.5) == "best-effort; least-tpot-ms=14.6"
    assert header(admission(), tpot_ms=1) == header(made, STALE_MS + 1, tpot_ms=1) == "None", "nothing predicts"
    assert header(admission(load(), predict=False), tpot_ms=1) == "None"
    assert made.unreachable(demand(slo=None), 0) is None


@given(
    tpot_ms=st.floats(0.01, 1000),
    fixed_ms=st.floats(0, 100),
    round_ms=st.floats(0.1, 100),
    tokens=st.floats(1, 8),
    run_ms=st.none() | st.floats(0.1, 50),
)
def test_the_least_time_per_token_is_the_least_that_can_be_promised(
    tpot_ms: float, fixed_ms: float, round_ms: float, tokens: float, run_ms: float | None
) -> None:
    costs = {"fixed_ms": fixed_ms, "round_ms": round_ms, "tokens_per_round": tokens, "run_ms": run_ms}
    least_ms = least_tpot_ms(**costs)
    assert step_need(least_ms * 1.001, away_ms=0.0, **costs) is not None
    assert step_need(least_ms * 0.999, away_ms=0.0, **costs) is None
    if abs(tpot_ms / least_ms - 1) > 1e-6:
        assert (step_need(tpot_ms, away_ms=0.0, **costs) is not None) == (tpot_ms > least_ms)


def test_sessions_accepted_since_the_last_load_count() -> None:
    for service_class, most in (("flex", 6), ("default", 8), ("priority", 10)):
        assert take_all(admission(load()), demand(service_class), 100) == most
    assert take_all(admission(load()), demand(prompts=(10, 10, 10)), 100) == 2
    assert take_all(admission(load(verifiers=4)), demand(), 100) == 32


def test_prompts_sent_since_the_last_load_add_to_the_queueing_time() -> None:
    # 40 + 10 ms for the round, 200 ms for each prompt: the fifth would come after 1050 ms.
    assert take_all(admission(load(round_ms=0.1)), demand(prompts=(200,)), 100) == 4
    made = admission(load(round_ms=0.1))
    assert take_all(made, demand(prompts=(200,)), 4) == 4
    made.update(load(round_ms=0.1), ARRIVED_MS - 1)
    assert made.ask(demand(prompts=(200,)), ARRIVED_MS) is not None
    made.update(load(round_ms=0.1), ARRIVED_MS)
    assert made.ask(demand(prompts=(200,)), ARRIVED_MS) is None


def test_a_session_counts_until_a_load_follows_its_first_result() -> None:
    made = admission(load(utilization=0.8))
    assert take_all(made, demand(), 2) == 2
    made.update(load(utilization=0.8), 10)
    assert made.ask(demand(), 10) is not None
    for session in list(made._running):
        made.answered(session)
    assert made.ask(demand(), 10) is not None
    made.update(load(utilization=0.8), 20)
    assert take_all(made, demand(), 5) == 2


def test_ended_sessions_free_their_share_until_the_next_load() -> None:
    made = admission(load())
    assert take_all(made, demand(), 8) == 8
    sessions = list(made._running)
    made.end(sessions[0], 1)  # in no Load yet: it no longer counts
    assert take_all(made, demand(), 5) == 1
    for session in sessions[1:]:
        made.answered(session)
    made.update(load(utilization=0.9), 2)
    made.end(sessions[1], 3)
    made.end(sessions[2], 3)
    assert made.ask(demand(), 3) is None
    made.update(load(utilization=0.9), 4)
    assert made.ask(demand(), 4) is not None


def test_a_load_whose_sessions_have_all_ended_refuses_nothing() -> None:
    made = admission()
    for name in ("a", "b"):
        made.start(name, "default", SLO, 10, 0.0)
        made.answered(name)
    made.update(
        load(utilization=1.48, classes=[ClassLoad(service_class="default", sessions=2, waiting=0, queue_ms=0)]), 0
    )
    made.end("a", 100.0)
    assert made.ask(demand(), 100.0) is not None, "one session still needs the verifiers"
    made.end("b", 100.0)
    assert take_all(made, demand(), 4) == 4


def test_under_deadlines_only_the_classes_ahead_add_queueing_time() -> None:
    waiting = [
        ClassLoad(service_class=name, sessions=9, waiting=count, queue_ms=0.0)
        for name, count in (("priority", 1), ("default", 2), ("flex", 6))
    ]
    slo = Slo(ttft_ms=500, tpot_ms=100)
    for first_come, refused in ((False, ["flex"]), (True, ["priority", "default", "flex"])):
        made = admission(load(first_come=first_come, backlog_ms=1000, classes=waiting, utilization=0.0))
        assert [name for name in ("priority", "default", "flex") if made.ask(demand(name, slo), 0)] == refused


def test_best_effort_is_refused_by_a_long_backlog_and_not_by_promises() -> None:
    made = admission(load(utilization=5.0, backlog_ms=20_000))
    for name in sorted(CLASSES):
        assert take_all(made, demand(name, None, prompts=(10, 10)), 50) == 50
        assert refused(made, demand(name)).code == "slo_unattainable_now"
    refusal = admission(load(backlog_ms=24_001.0)).ask(demand("flex", None), 0)
    assert refusal is not None
    assert refusal.code == "overloaded"


def test_the_backlog_limit_holds_for_every_class_and_unpredicted() -> None:
    for name, limit_ms in (("priority", 30_000), ("default", 27_000), ("flex", 24_000)):
        for predict in (True, False):
            over, under = (load(backlog_ms=limit_ms + more, utilization=0.0) for more in (1, -1))
            assert admission(over, predict=predict).ask(demand(name, None), 0) is not None
            assert admission(under, predict=predict).ask(demand(name, None), 0) is None


def test_a_used_share_without_sessions_refuses_nothing() -> None:
    strict = demand(slo=Slo(ttft_ms=1000, tpot_ms=30))
    assert admission(load(utilization=0.3)).ask(strict, 0) is not None
    made = admission(load(utilization=0.3, period_ms=None, classes=[]))
    assert made.ask(strict, 0) is None
    made.start("s", "flex", None, 1, 0)
    assert made.ask(strict, 0) is None, "nothing is promised to a best-effort session"
    made.answered("s")
    made.update(load(utilization=0.3, classes=[ClassLoad(service_class="flex", sessions=1, waiting=0, queue_ms=0)]), 1)
    assert made.ask(strict, 1) is not None
    made.end("s", 2)
    assert made.ask(strict, 2) is None


def test_without_prediction_promises_refuse_nothing() -> None:
    made = admission(load(utilization=5.0, backlog_ms=10_000), predict=False)
    assert take_all(made, demand(), 50) == 50


def test_an_old_load_refuses_nothing() -> None:
    made = admission(load(utilization=5.0, backlog_ms=1e6))
    assert made.ask(demand(), STALE_MS) is not None
    assert made.ask(demand(), STALE_MS + 1) is None
    assert admission(load(utilization=5.0, verifiers=0)).ask(demand(), 0) is None
    assert admission().ask(demand(), 0) is None


def test_sessions_are_limited_in_all_and_by_class() -> None:
    classes = CLASSES | {"batch": ServiceClass(max_sessions=3)}
    made = admission(classes=classes, max_sessions=5)
    assert take_all(made, demand("batch", None, prompts=(1, 1)), 9) == 1
    assert take_all(made, demand("batch", None), 9) == 1
    assert take_all(made, demand(), 9) == 2
    refusal = made.ask(demand(), 0)
    assert refusal is not None
    assert refusal.code == "too_many_sessions"


def refused(made: Admission, asked: Demand, now_ms: float = 0.0) -> Refusal:
    refusal = made.ask(asked, now_ms)
    assert refusal is not None
    return refusal


def test_the_retry_time_follows_the_duration_of_completions() -> None:
    made = admission(max_sessions=4)
    assert take_all(made, demand(), 9) == 4
    assert refused(made, demand()).retry_after_s == 2  # nothing has ended, so 5 s / 4 is assumed
    made.answered(next(iter(made._running)))
    made.end(next(iter(made._running)), 20_000)
    made.start("x", "default", SLO, 1, 20_000)
    assert refused(made, demand(), 20_000).retry_after_s == 5
    assert refused(made, demand(prompts=(1, 1, 1)), 20_000).retry_after_s == 15
    made.end("x", 20_001)  # never answered, so its duration does not count
    made.start("y", "default", SLO, 1, 20_001)
    assert refused(made, demand(), 20_001).retry_after_s == 5
    # An eighth of the promised share has to become free: an eighth of a completion's duration.
    made = admission()
    made.start("x", "default", SLO, 1, 0)
    made.answered("x")
    made.end("x", 20_000)
    made.update(load(utilization=0.8, round_ms=40.0), 20_000)
    assert refused(made, demand(), 20_000).retry_after_s == 3


def test_the_retry_time_follows_the_backlog() -> None:
    assert refused(admission(load(backlog_ms=34_500)), demand("priority", None)).retry_after_s == 5
    assert refused(admission(load(backlog_ms=4_000)), demand()).retry_after_s == 4  # 4000 + 60 - 1000 ms
    assert refused(admission(load(backlog_ms=1e7)), demand("priority", None)).retry_after_s == LONGEST_RETRY_S


times = st.floats(0, 1e5)
promises = st.builds(Slo, ttft_ms=st.floats(1, 1e5), tpot_ms=st.floats(0.1, 1e4))
slos = st.none() | promises
class_loads = st.lists(
    st.builds(
        ClassLoad,
        service_class=st.sampled_from(["priority", "default", "flex", "other"]),
        sessions=st.integers(0, 50),
        waiting=st.integers(0, 50),
        queue_ms=times,
    ),
    max_size=4,
    unique_by=lambda reported: reported.service_class,
)
loads = st.builds(
    load,
    first_come=st.booleans(),
    verifiers=st.integers(0, 5),
    utilization=st.floats(0, 2),
    demand=st.floats(0, 2),
    room_tokens_per_ms=st.none() | st.floats(0.001, 10.0),
    fixed_ms=times,
    period_ms=st.none() | times,
    round_ms=times,
    run_own_ms=st.none() | times,
    tokens_per_round=st.floats(1, 9),
    prefill_ms=st.floats(0, 100),
    backlog_ms=times,
    classes=class_loads,
)
prompts = st.lists(st.integers(1, 4000), min_size=1, max_size=5).map(tuple)
started = st.lists(st.tuples(st.sampled_from(sorted(CLASSES)), slos, st.integers(1, 4000), st.booleans()), max_size=6)


def busy(reported: Load, sessions: list[tuple[str, Slo | None, int, bool]]) -> Admission:
    """Admission with some sessions; the last Load has the answered ones."""
    made = admission(max_sessions=8)
    for number, (service_class, slo, prompt, answered) in enumerate(sessions):
        made.start(f"s{number}", service_class, slo, prompt, 0)
        if answered:
            made.answered(f"s{number}")
    made.update(reported, 10)
    for number, (*_, answered) in enumerate(sessions[:2]):
        if answered:
            made.end(f"s{number}", 20)
    return made


@given(loads, started, slos, prompts, times)
def test_priority_requests_are_refused_last(
    reported: Load, sessions: list[Any], slo: Slo | None, asked: tuple[int, ...], elapsed_ms: float
) -> None:
    made = busy(reported, sessions)
    flex, default, priority = (
        made.ask(demand(name, slo, asked, elapsed_ms), 30) for name in ("flex", "default", "priority")
    )
    assert priority is None or default is not None
    assert default is None or flex is not None


@given(loads, started, st.sampled_from(sorted(CLASSES)), prompts)
def test_only_counts_and_backlog_refuse_best_effort(
    reported: Load, sessions: list[Any], name: str, asked: tuple[int, ...]
) -> None:
    made = busy(reported, sessions)
    refusal = made.ask(demand(name, None, asked), 30)
    if refusal is not None:
        assert refusal.code in {"overloaded", "too_many_sessions"}
        unpredicted = Admission(CLASSES, 8, 30_000.0, predict=False)
        unpredicted.__dict__.update({key: value for key, value in made.__dict__.items() if key != "_predict"})
        assert unpredicted.ask(demand(name, None, asked), 30) == refusal


@given(loads, slos, st.sampled_from(sorted(CLASSES)), prompts, times)
def test_an_idle_fleet_accepts_everything(
    reported: Load, slo: Slo | None, name: str, asked: tuple[int, ...], elapsed_ms: float
) -> None:
    idle = reported.model_copy(update={"classes": [], "backlog_ms": 0.0})
    assert admission(idle).ask(demand(name, slo, asked, elapsed_ms), 0) is None


@given(loads, started, slos, st.sampled_from(sorted(CLASSES)), prompts, st.floats(0, 2), times)
def test_a_refused_request_is_refused_under_more_load(
    reported: Load,
    sessions: list[Any],
    slo: Slo | None,
    name: str,
    asked: tuple[int, ...],
    more: float,
    more_ms: float,
) -> None:
    heavier = reported.model_copy(
        update={
            "utilization": reported.utilization + more,
            "demand": reported.demand + more,
            "backlog_ms": reported.backlog_ms + more_ms,
        }
    )
    if busy(reported, sessions).ask(demand(name, slo, asked), 30) is not None:
        assert busy(heavier, sessions).ask(demand(name, slo, asked), 30) is not None


@given(loads, promises, st.sampled_from(sorted(CLASSES)), prompts)
def test_between_two_loads_no_class_exceeds_its_share(
    reported: Load, slo: Slo, name: str, asked: tuple[int, ...]
) -> None:
    made = admission(reported)
    taken = take_all(made, demand(name, slo, asked), 40)
    all_of_them = [slo.tpot_ms] * (taken * len(asked))
    if not any(shown.sessions for shown in reported.classes):
        # The share used by ended sessions is free, and the first request may fill it by itself.
        reported = reported.model_copy(update={"utilization": 0.0, "demand": 0.0, "period_ms": None})
    if taken > 1 and reported.verifiers and promised(reported, [slo.tpot_ms], []) > 0:
        assert promised(reported, all_of_them, []) <= CLASSES[name].admit_to


@given(loads, started, slos, st.sampled_from(sorted(CLASSES)), prompts, st.floats(0, 1e9))
def test_the_retry_time_is_whole_seconds_within_bounds(
    reported: Load, sessions: list[Any], slo: Slo | None, name: str, asked: tuple[int, ...], ended_ms: float
) -> None:
    made = busy(reported, sessions)
    made.start("long", "default", None, 1, 0)
    made.answered("long")
    made.end("long", ended_ms)
    if (refusal := made.ask(demand(name, slo, asked), 30)) is not None:
        assert isinstance(refusal.retry_after_s, int)
        assert 1 <= refusal.retry_after_s <= LONGEST_RETRY_S
        assert refusal.code in {"slo_unattainable_now", "overloaded", "too_many_sessions"}
        assert f"try again in {refusal.retry_after_s} s" in refusal.message
