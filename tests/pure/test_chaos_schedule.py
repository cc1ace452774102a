"""What a chaos run does and asks, by its seed; and how it judges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tools.chaos import report
from services.tools.chaos.client import Outcome, Verdict
from services.tools.chaos.core.faults import Fault, Kind, schedule
from services.tools.chaos.core.requests import Manner, load
from services.tools.chaos.fault_runner import Hit
from services.tools.chaos.run import Verdicts


@given(st.integers(0, 10**6), st.integers(0, 300))
def test_a_seed_repeats_its_faults_and_requests(seed: int, count: int) -> None:
    assert schedule(seed, count) == schedule(seed, count)
    assert len(schedule(seed, count)) == count
    assert load(seed, 3, 20).request(2, 5) == load(seed, 3, 20).request(2, 5)


def test_a_long_schedule_has_every_kind_and_seeds_differ() -> None:
    faults = schedule(1, 200)
    assert {fault.kind for fault in faults[: len(Kind)]} == set(Kind)
    assert [fault.kind for fault in faults] != [fault.kind for fault in schedule(2, 200)]
    assert all(fault.hold_s >= 0 and 0 <= fault.pick < 1 for fault in faults)


def test_requests_are_of_every_manner() -> None:
    asked = load(1, 8, 48)
    requests = [asked.request(client, number) for client in range(10) for number in range(10)]
    assert {request.manner for request in requests} == set(Manner)
    assert {request.chat for request in requests} == {True, False}
    assert len({request.question.number for request in requests}) == 8


def outcome(verdict: Verdict, started_s: float, ended_s: float, *, code: str = "", stall_s: float = 0.1) -> Outcome:
    request = load(1, 2, 8).request(0, 0)
    return Outcome(request, started_s, ended_s, verdict, "what came", code, longest_stall_s=stall_s)


def hit(kind: Kind, began_s: float, ended_s: float) -> Hit:
    return Hit(Fault(0, kind, 0.5, 1.0, 0.0), "it", began_s, ended_s)


@pytest.mark.parametrize(
    ("verdict", "code", "problem"),
    [
        (Verdict.RIGHT, "", False),
        (Verdict.LEFT, "", False),
        (Verdict.WRONG, "", True),
        (Verdict.LOST, "", True),
        (Verdict.ERROR, "session_gone", False),
        (Verdict.ERROR, "internal", True),
    ],
)
def test_a_run_passes_only_without_wrong_and_lost_answers(verdict: Verdict, code: str, problem: bool) -> None:
    verdicts = Verdicts([hit(Kind.LOSE_REDIS, 5, 6)], [outcome(verdict, 1, 10, code=code)])
    verdicts.conclude()
    assert bool(verdicts.problems) is problem


def test_an_error_is_excused_only_by_data_that_was_lost_while_it_mattered() -> None:
    gone = outcome(Verdict.ERROR, 1, 10, code="session_gone")
    assert not Verdicts([hit(Kind.KILL_REDIS, 5, 6)], [gone]).excused(gone)
    assert not Verdicts([hit(Kind.LOSE_REDIS, 11, 12)], [gone]).excused(gone)
    late = outcome(Verdict.ERROR, 500, 510, code="session_gone")
    assert not Verdicts([hit(Kind.LOSE_REDIS, 5, 6)], [late]).excused(late)


def test_the_table_counts_a_request_for_every_fault_that_it_lived_through() -> None:
    hits = [hit(Kind.KILL_VERIFIER, 2, 4), hit(Kind.KILL_VERIFIER, 20, 21), hit(Kind.FREEZE_REDIS, 3, 9)]
    outcomes = [
        outcome(Verdict.RIGHT, 1, 10, stall_s=3.0),
        outcome(Verdict.WRONG, 8, 12),
        outcome(Verdict.RIGHT, 30, 31),
    ]
    rows = [dict(zip(report.COLUMNS, row, strict=True)) for row in report.rows(Verdicts(hits, outcomes))]
    counts = {row["fault"]: (row["times"], row["requests during it"], row["recovered"], row["wrong"]) for row in rows}
    assert counts == {"kill verifier": (2, 1, 1, 0), "freeze Redis": (1, 2, 1, 1), "all": (3, 3, 1, 1)}
