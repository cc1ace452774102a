"""The chaos tool: faults and requests by seed, and the judgement of a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tools.chaos.core import report
from services.tools.chaos.core.faults import Fault, FaultKind, schedule
from services.tools.chaos.core.requests import Manner, load
from services.tools.chaos.core.verdicts import ChaosResult, InjectedFault, RequestOutcome, RequestVerdict


@given(st.integers(0, 10**6), st.integers(0, 300))
def test_a_seed_repeats_its_faults_and_requests(seed: int, count: int) -> None:
    assert schedule(seed, count) == schedule(seed, count)
    assert len(schedule(seed, count)) == count
    assert load(seed, 3, 20).request(2, 5) == load(seed, 3, 20).request(2, 5)


def test_a_long_schedule_has_every_kind_and_seeds_differ() -> None:
    faults = schedule(1, 200)
    assert {fault.kind for fault in faults[: len(FaultKind)]} == set(FaultKind)
    assert [fault.kind for fault in faults] != [fault.kind for fault in schedule(2, 200)]
    assert all(fault.hold_s >= 0 and 0 <= fault.pick < 1 for fault in faults)


def test_requests_have_every_manner() -> None:
    asked = load(1, 8, 48)
    requests = [asked.request(client, number) for client in range(10) for number in range(10)]
    assert {request.manner for request in requests} == set(Manner)
    assert {request.chat for request in requests} == {True, False}
    assert len({request.question.number for request in requests}) == 8


def outcome(
    verdict: RequestVerdict, started_s: float, ended_s: float, *, code: str = "", stall_s: float = 0.1
) -> RequestOutcome:
    request = load(1, 2, 8).request(0, 0)
    return RequestOutcome(request, started_s, ended_s, verdict, "what came", code, longest_stall_s=stall_s)


def hit(kind: FaultKind, began_s: float, ended_s: float) -> InjectedFault:
    return InjectedFault(Fault(0, kind, 0.5, 1.0, 0.0), "it", began_s, ended_s)


@pytest.mark.parametrize(
    ("verdict", "code", "problem"),
    [
        (RequestVerdict.RIGHT, "", False),
        (RequestVerdict.LEFT, "", False),
        (RequestVerdict.WRONG, "", True),
        (RequestVerdict.LOST, "", True),
        (RequestVerdict.ERROR, "session_gone", False),
        (RequestVerdict.ERROR, "internal", True),
    ],
)
def test_a_wrong_or_lost_answer_fails_the_run(verdict: RequestVerdict, code: str, problem: bool) -> None:
    result = ChaosResult([hit(FaultKind.LOSE_REDIS, 5, 6)], [outcome(verdict, 1, 10, code=code)])
    result.conclude()
    assert bool(result.problems) is problem


def test_an_error_is_excused_only_by_data_lost_during_the_request() -> None:
    gone = outcome(RequestVerdict.ERROR, 1, 10, code="session_gone")
    assert not ChaosResult([hit(FaultKind.KILL_REDIS, 5, 6)], [gone]).excused(gone)
    assert not ChaosResult([hit(FaultKind.LOSE_REDIS, 11, 12)], [gone]).excused(gone)
    late = outcome(RequestVerdict.ERROR, 500, 510, code="session_gone")
    assert not ChaosResult([hit(FaultKind.LOSE_REDIS, 5, 6)], [late]).excused(late)


def test_the_table_counts_a_request_for_every_fault_it_overlaps() -> None:
    hits = [hit(FaultKind.KILL_VERIFIER, 2, 4), hit(FaultKind.KILL_VERIFIER, 20, 21), hit(FaultKind.FREEZE_REDIS, 3, 9)]
    outcomes = [
        outcome(RequestVerdict.RIGHT, 1, 10, stall_s=3.0),
        outcome(RequestVerdict.WRONG, 8, 12),
        outcome(RequestVerdict.RIGHT, 30, 31),
    ]
    rows = [dict(zip(report.COLUMNS, row, strict=True)) for row in report.rows(ChaosResult(hits, outcomes))]
    counts = {row["fault"]: (row["times"], row["requests during it"], row["recovered"], row["wrong"]) for row in rows}
    assert counts == {"kill verifier": (2, 1, 1, 0), "freeze Redis": (1, 2, 1, 1), "all": (3, 3, 1, 1)}
