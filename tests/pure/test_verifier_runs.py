"""Runs in the verifier: which steps they take part in, what is reported when, and how they end."""

from __future__ import annotations

import builders

from services.verifier.core.acceptance import Verdict
from services.verifier.core.runs import REPORT_MS, Run, RunReport, RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.messages import Finish, RunGrant, Sampling

LEASE = 7


def started(table: RunTable, session: str = "s", *, tokens: int = 8, ms: float = 1000.0, room: int = 20) -> Run:
    """A run of a session with three tokens, whose round has brought a fourth one and is committed."""
    job = builders.job(session, 2, 3, [9], run=RunGrant(tokens=tokens, ms=ms))
    task = VerifyTask(session, [5, 6, 7], [9], Sampling(), frozenset({2}), room)
    run = table.start(job, task, VerifyOutcome(Verdict(0, [8], None), 1, 4, 2), LEASE, 0.0)
    assert run is not None
    run.confirmed = True
    return run


def step(table: RunTable, now_ms: float, token: int = 10, finish: Finish | None = None) -> None:
    for run in table.step(LEASE, now_ms):
        table.record(run, VerifyOutcome(Verdict(0, [token], finish), 0, run.length, 1), 10.0, now_ms)


def due(table: RunTable, now_ms: float) -> list[RunReport]:
    return table.due(now_ms, between_steps=True)


def test_a_run_goes_on_from_the_round_before_it_is_committed() -> None:
    table = RunTable(digests=False)
    run = started(table)
    run.confirmed = False
    step(table, 10.0, 10)
    step(table, 2 * REPORT_MS, 11)
    assert run.task.tokens == [5, 6, 7, 8, 10, 11]
    assert due(table, 2 * REPORT_MS) == [], "the round's commit may still fail"
    run.confirmed = True
    (report,) = due(table, 2 * REPORT_MS)
    assert (report.commit.base_len, report.commit.tokens, report.commit.round) == (4, (10, 11), 3)
    assert (report.left, report.verify_ms) == (6, 20.0)


def test_runs_are_reported_together() -> None:
    table = RunTable(digests=False)
    started(table, "early")
    step(table, 0.6 * REPORT_MS, 10)
    late = started(table, "late")
    late.reported_ms = 0.6 * REPORT_MS
    step(table, REPORT_MS, 11)
    reports = due(table, REPORT_MS)
    assert [(report.run.job.session, report.commit.tokens) for report in reports] == [
        ("early", (10, 11)),
        ("late", (11,)),
    ]
    assert due(table, REPORT_MS) == []


def test_a_run_that_ends_is_reported_without_the_others() -> None:
    table = RunTable(digests=False)
    started(table, "goes-on")
    started(table, "ends", tokens=1)
    step(table, 10.0, 10)
    assert [(report.run.job.session, report.left) for report in due(table, 10.0)] == [("ends", 0)]


def test_reports_wait_for_each_other_and_gather_tokens() -> None:
    table = RunTable(digests=False)
    started(table)
    step(table, 10.0, 10)
    assert due(table, 10.0) == [], "too soon"
    step(table, REPORT_MS, 11)
    (first,) = due(table, REPORT_MS)
    step(table, 3 * REPORT_MS, 12)
    assert due(table, 3 * REPORT_MS) == [], "the first report is not committed yet"
    table.reported(first)
    (second,) = due(table, 3 * REPORT_MS)
    assert (second.commit.base_len, second.commit.tokens, second.commit.round) == (6, (12,), 4)


def test_the_last_report_comes_at_once_and_ends_the_run() -> None:
    for end in ("tokens", "time", "finish", "halt", "close"):
        table = RunTable(digests=False)
        run = started(table, tokens=2, ms=1000.0 if end != "time" else 5.0)
        if end == "halt":
            table.halt(["s", "unknown"])
        elif end == "close":
            table.close()
        step(table, 10.0, 10, Finish.STOP if end == "finish" else None)
        if end == "tokens":
            step(table, 11.0, 11)
        assert not table.decoding, end
        (report,) = due(table, 11.0)
        assert report.left == 0, end
        assert report.commit.finish == (Finish.STOP if end == "finish" else None)
        table.reported(report)
        assert len(table) == 0, end
        assert run.over


def test_a_run_that_ends_during_a_report_reports_the_rest_afterwards() -> None:
    table = RunTable(digests=False)
    started(table, tokens=2)
    step(table, REPORT_MS, 10)
    (first,) = due(table, REPORT_MS)
    step(table, REPORT_MS + 1, 11)
    assert table.due(REPORT_MS + 1, between_steps=False) == []
    table.reported(first)
    (last,) = table.due(REPORT_MS + 1, between_steps=False)
    assert (last.commit.tokens, last.left) == ((11,), 0)


def test_a_refused_step_during_a_report_leaves_no_run() -> None:
    table = RunTable(digests=False)
    run = started(table)
    step(table, REPORT_MS, 10)
    (report,) = due(table, REPORT_MS)
    table.record(run, VerifyOutcome(None, 0, 0, 0, ValueError("no room")), 10.0, REPORT_MS + 1)
    table.reported(report)
    assert len(table) == 0


def test_during_a_step_only_runs_that_are_over_are_reported() -> None:
    table = RunTable(digests=False)
    started(table)
    step(table, 10.0)
    assert table.due(10 * REPORT_MS, between_steps=False) == [], "the step in progress may be adding to its digest"


def test_runs_of_an_ended_lease_decode_nothing() -> None:
    table = RunTable(digests=False)
    started(table)
    assert table.step(LEASE + 1, 1.0) == []
    assert len(table) == 0


def test_no_run_starts_without_grant_lease_or_verdict_nor_while_draining() -> None:
    table = RunTable(digests=False)
    task = VerifyTask("s", [5], [], Sampling(), frozenset(), 9)
    granted = builders.job(run=RunGrant(tokens=4, ms=100.0))
    verdict, ended = VerifyOutcome(Verdict(0, [8], None), 0, 1, 1), VerifyOutcome(Verdict(0, [2], Finish.STOP), 0, 1, 1)
    assert table.start(builders.job(), task, verdict, LEASE, 0.0) is None
    assert table.start(granted, task, verdict, 0, 0.0) is None
    assert table.start(granted, task, ended, LEASE, 0.0) is None
    assert table.start(granted, task, VerifyOutcome(None, 0, 0, 0, ValueError()), LEASE, 0.0) is None
    table.close()
    assert table.start(granted, task, verdict, LEASE, 0.0) is None


def test_a_refused_step_drops_the_run() -> None:
    table = RunTable(digests=False)
    (run,) = [started(table)]
    table.record(run, VerifyOutcome(None, 0, 0, 0, ValueError("no room")), 1.0, 1.0)
    assert len(table) == 0


def test_a_job_of_a_session_in_a_run_takes_over_its_results() -> None:
    table = RunTable(digests=False)
    run = started(table)
    other = builders.job("s", 9, 3, drafter="other", run=RunGrant(tokens=4, ms=100.0))
    assert table.join(other) is run
    assert (run.job, run.left) == (other, 8)
    table.join(builders.job("s", 9, 3))
    assert run.left == 1, "a job without a grant halts the run"
    assert table.join(builders.job("unknown")) is None


def test_a_session_never_gets_more_tokens_than_it_has_room_for() -> None:
    table = RunTable(digests=False)
    run = started(table, tokens=64, room=3)
    assert run.task.room == 2, "the round has brought one"
    step(table, 1.0)
    assert run.task.room == 1


def test_a_digest_covers_the_rows_of_one_report() -> None:
    table = RunTable(digests=True)
    run = started(table)
    run.task.digest.update(b"row 1")
    step(table, REPORT_MS, 10)
    (report,) = due(table, REPORT_MS)
    assert report.logits_digest == "96e3051150089bfa"
    assert run.task.digest.hexdigest() != report.logits_digest, "the next report has a digest of its own"
