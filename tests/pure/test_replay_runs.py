"""Runs in recordings: in a session's timeline, computed again, and in virtual time."""

from __future__ import annotations

from io import StringIO

import builders
import pytest
import recorded
from recorded import START_MS, A, Sent
from rich.console import Console

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import SchedulingRules
from services.scheduler.core.policies import PolicyOptions
from services.tools.cli.paint import Painter
from services.tools.cli.replay.timeline_view import timeline_view
from services.tools.replayer.core.batches import recorded_batches
from services.tools.replayer.core.performance import Performance, recorded_performance
from services.tools.replayer.core.sessions import read_sessions
from services.tools.replayer.core.timeline import timeline
from services.tools.replayer.core.timeline_records import Phase, Timeline
from services.tools.replayer.core.trace import trace_events
from services.tools.replayer.core.traffic import RecordedDraft, RecordedRequest, RecordedTraffic, recorded_traffic
from services.tools.replayer.core.what_if import DraftPlan, what_if
from shared.messages import Ended, Finish, RunGrant

LIMITS = BatchLimits(max_batch_ms=400, max_batch_tokens=2048)


def sent() -> list[Sent]:
    """One session: a plain round, a run of three tokens in two reports, and the round that ends it."""
    run = {"run": True, "batch": "run"}
    return [
        (0.0, "heartbeat.v1", builders.heartbeat(free_tokens=4096, total_tokens=4096)),
        (5.0, "generate.pool", recorded.generate(max_tokens=5)),
        (20.0, "verify", recorded.verify(A, 0, 3, [], run_tokens=3)),
        (24.0, "batch.v1", recorded.batch("s1-1", recorded.job(A, 0, 3, [], run=RunGrant(tokens=3, ms=500.0)))),
        (60.0, "result.d1", recorded.result(A, 0, 3, "s1-1", [11], verify_ms=30.0, new_tokens=3, run_left=3)),
        (110.0, "result.d1", recorded.result(A, 1, 4, "run", [12, 13], verify_ms=40.0, run_left=1, **run)),
        (130.0, "result.d1", recorded.result(A, 2, 6, "run", [14], verify_ms=20.0, **run)),
        (135.0, "verify", recorded.verify(A, 3, 7, [])),
        (136.0, "batch.v1", recorded.batch("s1-2", recorded.job(A, 3, 7, []))),
        (160.0, "result.d1", recorded.result(A, 3, 7, "s1-2", [15], verify_ms=20.0, finish=Finish.LENGTH)),
        (161.0, "ended", Ended(session=A, reason="length", tokens=5, attained=True)),
    ]


def test_the_text_of_a_session_includes_its_runs() -> None:
    session = read_sessions(recorded.recording(sent()).entries())[A]
    assert session.output() == {3: 11, 4: 12, 5: 13, 6: 14, 7: 15}
    assert session.complete


def shown(one: Timeline, *, steps: bool = False) -> str:
    """The timeline's text in a terminal."""
    console = Console(file=StringIO(), width=200, no_color=True)
    console.print(timeline_view(one, lambda token: f"<{token}>", Painter(console).style, steps=steps))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_run_is_one_line_and_a_phase_of_the_timeline() -> None:
    one = timeline(read_sessions(recorded.recording(sent()).entries())[A])
    (run,) = one.runs
    assert (run.after, run.base_len, run.tokens) == (0, 4, [12, 13, 14])
    assert [(report.at_ms, report.tokens, report.verify_ms) for report in run.reports] == [(110, 2, 40), (130, 1, 20)]
    assert (run.start_ms, run.total_ms, run.verify_ms) == (60, 70, 60)
    assert one.parts[Phase.RUN] == 70
    assert one.total_ms == sum(one.parts.values())
    text = shown(one)
    assert "5 tokens of at most 5 in 2 rounds and 1 run" in text
    assert "run  on v1 in 70 ms: 3 steps of 20.0 ms, 2 reports: '<12><13><14>'" in text


def test_the_steps_of_a_run_are_shown_on_demand() -> None:
    messages = sent()
    at = next(i for i, (_, _, message) in enumerate(messages) if getattr(message, "round", 0) == 1)
    fields = {"run": True, "run_left": 1, "verify_ms": 40.0, "drafted": 1, "trimmed_to": 1, "copied": [0]}
    copied = recorded.result(A, 1, 4, "run", [12, 13], **fields)
    messages[at] = (110.0, "result.d1", copied)
    one = timeline(read_sessions(recorded.recording(messages).entries())[A])
    brief, whole = (shown(one, steps=steps) for steps in (False, True))
    assert "run  on v1 in 70 ms: 2 steps of 30.0 ms, 1 copied token, 2 reports: '<12><13><14>'" in brief
    steps = ["at 110 ms: 1 step of 40.0 ms: ‹'<12>'› '<13>'", "at 130 ms: 1 step of 20.0 ms: '<14>'"]
    assert not any(step in brief for step in steps)
    assert all(step in whole for step in steps)


def test_a_report_is_computed_again_like_a_draft_that_was_accepted() -> None:
    found = recorded_batches(recorded.recording(sent()))
    jobs = [(one.tokens, one.job.draft, one.result.tokens, one.result.accepted) for _, (one,) in found.computed()]
    assert jobs == [
        ([5, 6, 7], [], [11], 0),
        ([5, 6, 7, 11], [12], [12, 13], 1),
        ([5, 6, 7, 11, 12, 13], [], [14], 0),
        ([5, 6, 7, 11, 12, 13, 14], [], [15], 0),
    ]


def test_a_run_is_a_slice_of_the_trace() -> None:
    sessions = read_sessions(recorded.recording(sent()).entries())
    slices = [event for event in trace_events(sessions.values()) if event["name"] == "run, 3 tokens"]
    assert [event["dur"] for event in slices] == [70_000]


def test_the_recorded_figures_count_the_tokens_of_runs() -> None:
    figures = recorded_performance(read_sessions(recorded.recording(sent()).entries()).values())
    assert (figures.tokens, figures.rounds) == (5, 2)


def test_recorded_drafts_keep_the_tokens_left_to_the_verifier() -> None:
    (request,) = recorded_traffic(recorded.recording(sent())).requests
    assert [(draft.base_len, draft.run_tokens) for draft in request.drafts] == [(3, 3), (7, 0)]
    assert request.drafts[1].away_ms == pytest.approx(6.0), "from the run's last report to the scheduler"


def test_recorded_copies_keep_their_places_and_the_wrong_ones_their_number() -> None:
    messages = sent()
    at = next(i for i, (_, _, message) in enumerate(messages) if getattr(message, "round", 0) == 1)
    fields = {"run": True, "run_left": 1, "verify_ms": 40.0, "trimmed_to": 3, "copied": [1]}
    messages[at] = (110.0, "result.d1", recorded.result(A, 1, 4, "run", [12, 13], **fields))
    (request,) = recorded_traffic(recorded.recording(messages)).requests
    assert request.copied == {5}
    assert request.wrong_copies == 1.0, "two in two steps"


def request(name: str, tokens: int, run_tokens: int, copied: frozenset[int], wrong: float) -> RecordedRequest:
    generate = recorded.generate(name, slo=None, max_tokens=tokens, elapsed_ms=0.0)
    text = [*generate.prompt, *range(100, 100 + tokens)]
    drafts = [RecordedDraft(3, [], 0, 0.0, 5.0, "d1", run_tokens, run_copies=8)]
    return RecordedRequest(generate, START_MS, text, drafts, copied=copied, wrong_copies=wrong)


def virtual(
    *without: str, sessions: int = 4, copied: frozenset[int] = frozenset(), wrong: float = 0.0, token_ms: float = 0.0
) -> Performance:
    coefficients = [15.0, 5.0, token_ms, 0.0, 0.0, 0.0, token_ms]
    model = builders.cost_model("v1", coefficients, ratio_p90=1, ratio_p99=1)
    traffic = RecordedTraffic(
        [request(f"s{i}", 40, 16, copied, wrong) for i in range(sessions)],
        [(START_MS - 100.0, builders.heartbeat("v1", lease=1))],
        [(START_MS - 100.0, model)],
        hop_ms=2.0,
        policy="wisp+",
        end_ms=START_MS + 1000.0,
    )
    rules = SchedulingRules("wisp+", LIMITS, options=PolicyOptions(without=frozenset(without)))  # type: ignore[arg-type]
    return what_if(traffic, rules, DraftPlan())


def test_runs_in_virtual_time_bring_every_token_with_fewer_rounds() -> None:
    runs, rounds = virtual(), virtual("runs")
    assert runs.complete == rounds.complete == 4
    assert runs.tokens == rounds.tokens == 160
    assert runs.rounds <= 4 * 4
    assert rounds.rounds == 160
    assert runs.throughput > 1.1 * rounds.throughput, "neither messages nor waiting between two tokens"


def test_steps_of_runs_in_virtual_time_follow_the_cost_model() -> None:
    alone = virtual(sessions=1)
    # Three rounds of 27 ms bring a run of 16, 16 and 5 tokens in steps of 20 ms each.
    assert alone.tpot_p50_ms == pytest.approx((37 * 20 + 2 * 27) / 39, abs=0.3)


def test_copies_are_played_where_the_recording_has_them() -> None:
    """Here two of three tokens are copies: a step brings three."""
    copied = frozenset(position for position in range(3, 43) if position % 3)
    plain, copying = virtual(sessions=1), virtual(sessions=1, copied=copied)
    assert copying.tokens == plain.tokens == 40
    assert plain.tpot_p50_ms is not None
    assert copying.tpot_p50_ms is not None
    assert copying.tpot_p50_ms < 0.5 * plain.tpot_p50_ms
    assert virtual("copies", sessions=1, copied=copied) == plain


def test_wrong_copies_take_their_time() -> None:
    found = [virtual(sessions=1, wrong=wrong, token_ms=2.0).tpot_p50_ms for wrong in (0.0, 0.5)]
    assert found[0] is not None
    assert found[1] is not None
    # Every other step of the 37 verifies one token more; the last step of each of three runs has no room for it.
    assert found[1] - found[0] == pytest.approx(17 * 2.0 / 39, abs=0.1)
