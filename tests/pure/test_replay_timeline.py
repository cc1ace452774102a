"""`wisp replay`: each phase's share of a session's time, and the outcome of each round."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import recorded
from recorded import A, B, C, Sent
from rich.console import Console

from services.tools.cli.paint import Painter
from services.tools.cli.replay.timeline_view import session_table, timeline_fields, timeline_view
from services.tools.replayer.core.recording import RecordingError
from services.tools.replayer.core.selection import find_session, select_sessions, session_ids_of
from services.tools.replayer.core.sessions import read_sessions
from services.tools.replayer.core.timeline import timeline
from services.tools.replayer.core.timeline_records import Phase, Timeline
from services.tools.replayer.times import parse_time_ms
from shared.messages import Cancel, Ended, Failure, Generate, Message, Result, Status, Verify, encode

ENGLISH = {11: "The", 12: " sky", 13: " sea", 14: " is", 15: " wide", 99: " is"}


def words(token: int) -> str:
    return ENGLISH.get(token, f"<{token}>")


def timeline_of(sent: list[Sent], session: str = A) -> Timeline:
    return timeline(read_sessions(recorded.recording(sent).entries())[session])


def shown(one: Timeline, width: int = 240) -> str:
    console = Console(file=StringIO(), width=width, no_color=True)
    console.print(timeline_view(one, words, Painter(console).style))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def without(kind: type[Message]) -> list[Sent]:
    return [one for one in recorded.sent() if not isinstance(one[2], kind)]


def test_every_millisecond_belongs_to_a_phase() -> None:
    one = timeline_of(recorded.sent())
    assert one.parts == {
        Phase.GATEWAY: 5,
        Phase.TO_DRAFTER: 7 + 5,
        Phase.DRAFT: 8 + 10,
        Phase.TO_SCHEDULER: 2 + 2,
        Phase.POOL: 2 + 8,
        Phase.BEHIND: 25,
        Phase.MODEL: 30 + 35,
        Phase.VERIFIER: 6 + 5,
        Phase.CLIENT: 5,
    }
    assert sum(one.parts.values()) == one.total_ms == 155
    assert [round_.total_ms for round_ in one.rounds] == [55, 90]
    assert one.inversions == []
    assert one.notes == []


def test_a_round_has_its_tokens_its_batch_and_the_batch_before() -> None:
    one = timeline_of(recorded.sent())
    round_ = one.rounds[1]
    assert (round_.draft, round_.trimmed, round_.verified, round_.accepted) == ([12, 13, 14, 15], 2, 2, 1)
    assert (round_.tokens, round_.own, round_.finish) == ([12, 99], 1, "length")
    assert (round_.slack_ms, round_.price_ms) == (50, 0.5)
    assert round_.left_out == [("s1-2", "no room")]
    [batch] = round_.batches
    assert (batch.batch, batch.mates, batch.behind, batch.behind_ms) == ("s1-3", [C], "s1-2", 25)
    assert (batch.waiting, batch.draft, batch.slack_ms, batch.reason) == (1, 2, 42, "due soon")
    assert one.rounds[0].price_ms is None
    assert one.rounds[0].batches[0].mates == []


def test_the_terminal_shows_the_whole_timeline() -> None:
    text = shown(timeline_of(recorded.sent()))
    for line in (
        "session chatcmpl-aaaaaaaa01",
        "default, SLO 100 ms, then 50 ms a token: attained",
        "3 prompt tokens, 3 tokens of at most 3 in 2 rounds; length; first token after 60 ms, then 45.0 ms a token",
        "g1 → d1, from 2025-11-24 16:00:00.000 UTC",
        "65.0 ms   42%  in the model",
        "accepted: ' sky'; rejected: ' sea'; trimmed: ' is' ' wide'; bonus: ' is'",
        "slack 50 ms when sent, price 0.50 ms a token",
        "left out of batch s1-2: no room",
        "batch s1-3 on v1 with cccccccc: 2 draft tokens, 3 tokens computed, 35.0 ms (predicted 33.0); wisp+: due soon",
        "1 round left in the queue; waited 25.0 ms for batch s1-2",
    ):
        assert line in text


def test_json_has_the_same_with_the_text_of_each_token() -> None:
    fields = json.loads(json.dumps(timeline_fields(timeline_of(recorded.sent()), words), allow_nan=False))
    assert fields["prompt_text"] == "<5><6><7>"
    assert fields["slo"] == {"ttft_ms": 100, "tpot_ms": 50}
    assert [token["fate"] for token in fields["rounds"][1]["draft"]] == ["accepted", "rejected", "trimmed", "trimmed"]
    assert fields["rounds"][1]["draft"][1] == {"id": 13, "text": " sea", "acceptance": 0.5, "fate": "rejected"}
    assert fields["rounds"][1]["tokens"] == [
        {"id": 12, "text": " sky", "draft": True},
        {"id": 99, "text": " is", "draft": False},
    ]
    assert fields["parts"][Phase.MODEL] == 65


def test_the_list_has_a_line_for_each_session() -> None:
    sessions = read_sessions(recorded.recording(recorded.sent()).entries())
    console = Console(file=StringIO(), width=160)
    console.print(session_table([timeline(session) for session in sessions.values()]))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 5
    assert " ".join(lines[1].split()) == "aaaaaaaa 16:00:00 default 3 3 2 60 45.0 155 length, SLO attained"
    assert lines[2].startswith("bbbbbbbb 16:00:00 default")
    assert lines[2].endswith("not ended in the recording")


def test_control_characters_do_not_reach_the_terminal() -> None:
    sent = recorded.sent()
    at_ms, key, message = sent[3]
    assert hasattr(message, "jobs")
    job = message.jobs[0].model_copy(update={"reason": "\x1b[2Jgone"})
    sent[3] = (at_ms, key, message.model_copy(update={"jobs": [job]}))
    assert "\x1b" not in shown(timeline_of(sent))


def test_clocks_that_disagree_are_named_and_make_no_phase_negative() -> None:
    behind_ms = 40.0  # of the drafter's clock
    sent = [
        (at - behind_ms if at is not None and isinstance(message, Verify) else at, key, message)
        for at, key, message in recorded.sent()
    ]
    one = timeline_of(sent)
    assert [(found.sender, found.receiver) for found in one.inversions] == [("g1", "d1"), ("v1", "d1")]
    assert max(found.ms for found in one.inversions) == 25
    assert min(min(round_.parts.values()) for round_ in one.rounds) > 0
    assert "the clocks of g1 and d1 differ" in shown(one)


def test_messages_without_a_time_leave_gaps_and_a_note() -> None:
    one = timeline_of([(None, key, message) for _, key, message in recorded.sent()])
    assert one.total_ms is None
    assert one.rounds[1].total_ms is None
    assert (one.rounds[1].accepted, one.tokens) == (1, 3)
    assert "give no send time" in one.notes[0]
    assert "accepted: ' sky'" in shown(one)


def test_a_session_without_its_beginning_is_shown_from_its_first_round() -> None:
    one = timeline_of(without(Generate))
    assert one.prompt is None
    assert one.notes == ["its beginning is not in the recording"]
    assert [round_.round for round_ in one.rounds] == [0, 1]
    assert "prompt not recorded" in shown(one)


def test_a_round_under_way_has_no_result() -> None:
    one = timeline_of(recorded.sent()[:9])
    assert one.ending == "not ended in the recording"
    assert (one.rounds[1].status, one.rounds[1].batches) == ("no result", [])
    assert "no result" in shown(one)


def test_a_round_resent_by_another_drafter_was_taken_over() -> None:
    sent = recorded.sent()
    again = recorded.verify(A, 1, 4, [12], drafter="d2", attempt=1)
    sent.insert(9, (79.0, "verify", again))
    one = timeline_of(sent)
    assert one.rounds[1].attempts == 2
    assert one.notes == ["drafter d2 took over round 1"]
    assert "sent 2 times" in shown(one)


def test_a_second_result_of_a_round_is_counted_and_ignored() -> None:
    sent = recorded.sent()
    sent.insert(-1, (153.0, "result.d1", recorded.result(A, 1, 4, "s1-4", [77])))
    one = timeline_of(sent)
    assert (one.rounds[1].tokens, one.rounds[1].repeated) == ([12, 99], 1)


def test_a_long_prompt_in_chunks_is_one_round_in_several_batches() -> None:
    chunk = recorded.job(B, 0, 600, [], prefill_to=256, queue_ms=1.0)
    rest = recorded.job(B, 0, 600, [], queue_ms=41.0)
    one = timeline_of(
        [
            (0.0, "verify", recorded.verify(B, 0, 600, [])),
            (2.0, "batch.v1", recorded.batch("s1-1", chunk)),
            (40.0, "result.d1", recorded.result(B, 0, 600, "s1-1", [], status=Status.PREFILLED, verify_ms=36.0)),
            (42.0, "batch.v1", recorded.batch("s1-2", rest)),
            (90.0, "result.d1", recorded.result(B, 0, 600, "s1-2", [8], verify_ms=47.0)),
        ],
        B,
    )
    [round_] = one.rounds
    assert [batch.prefill_to for batch in round_.batches] == [256, None]
    assert round_.parts == {Phase.TO_SCHEDULER: 1, Phase.POOL: 1 + 2, Phase.MODEL: 36 + 47, Phase.VERIFIER: 2 + 1}
    assert sum(round_.parts.values()) == round_.total_ms == 90
    assert "prompt to token 256" in shown(one)


@pytest.mark.parametrize(
    ("message", "ending"),
    [
        (Cancel(session=A, reason="client left"), "cancelled (client left)"),
        (Ended(session=A, reason="refused", code="utilization"), "refused (utilization)"),
    ],
)
def test_the_ending_has_its_reason(message: Message, ending: str) -> None:
    assert timeline_of([*without(Ended), (160.0, "ended", message)]).ending == ending


def test_a_failed_round_has_its_reason() -> None:
    failed = recorded.result(
        A, 1, 4, "s1-3", [], status=Status.FAILED, error=Failure(code="too_long", message="no room for it")
    )
    sent = [(at, key, failed if isinstance(m, Result) and m.round == 1 else m) for at, key, m in recorded.sent()]
    text = shown(timeline_of([one for one in sent if not isinstance(one[2], Ended)]))
    assert "failed (too_long)" in text
    assert "failed: no room for it" in text


def test_unknown_messages_are_skipped_and_counted() -> None:
    recording = recorded.recording(recorded.sent())
    recording.packed.insert(3, recording.packed[0].__class__(1, "verify", b"garbage"))
    assert len(list(recording.entries())) == len(recorded.sent())
    assert sum(recording.skipped.values()) == 1


def test_a_recording_is_limited_to_a_span_of_time() -> None:
    recording = recorded.recording(recorded.sent())
    start = recorded.START_MS
    assert len(recording.within(start + 70, start + 85).packed) == 5
    assert len(recording.within(None, start + 5).packed) == 2
    assert recording.within(None, None) is recording


def test_times_are_parsed_as_ages_and_as_iso_dates() -> None:
    assert parse_time_ms("90s", 100_000) == 10_000
    assert parse_time_ms("1.5m", 100_000) == 10_000
    assert parse_time_ms("2h", 7_200_000) == 0
    assert parse_time_ms("1970-01-02T00:00:00+00:00", 0) == 86_400_000
    with pytest.raises(RecordingError, match="'yesterday' is no point in time: give an age"):
        parse_time_ms("yesterday", 0)


def test_a_session_is_found_by_the_beginning_of_its_id() -> None:
    names = [A, B, C, "chatcmpl-bbbb9"]
    assert find_session(A, names) == A
    assert find_session("aaaa", names) == A
    assert find_session("chatcmpl-cc", names) == C
    with pytest.raises(RecordingError, match="may be any of"):
        find_session("bbbb", names)
    with pytest.raises(RecordingError, match=r"no session 'x' in the recording, which has 4"):
        find_session("x", names)


def test_a_session_is_selected_with_its_whole_batches() -> None:
    recording = recorded.recording(recorded.sent())
    assert session_ids_of(recording) == {A, B, C}
    of_c = select_sessions(recording, {C})
    kinds = [type(entry.message).__name__ for entry in of_c.entries()]
    assert kinds == ["Heartbeat", "Load", "Verify", "Batch", "Result"]
    assert of_c.packed[3].body == encode(recorded.sent()[10][2]), "its batch with all jobs"
