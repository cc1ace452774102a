"""Recordings as files: they read back as they were written, with or without the users' text."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import builders
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st

from services.tools.replayer import files
from services.tools.replayer.core.recording import PackedMessage, Recording, RecordingError, RecordingSource
from services.tools.replayer.core.redaction import redacted
from services.tools.replayer.core.sessions import read_sessions
from services.tools.replayer.core.timeline import timeline
from shared.messages import MESSAGES, Generate, HiddenStates, Result, Verify, encode

SECRET = 48_151


def written(tmp_path: Path, name: str = "recording.jsonl", **options: bool) -> Path:
    path = tmp_path / name
    files.write(path, recorded.recording(recorded.sent()), **options)
    return path


@pytest.mark.parametrize("name", ["recording.jsonl", "recording.jsonl.gz"])
def test_a_file_holds_every_message_with_its_time(tmp_path: Path, name: str) -> None:
    recording = recorded.recording(recorded.sent())
    read = files.read(written(tmp_path, name))
    assert [(one.at_us, one.key) for one in read.packed] == [(one.at_us, one.key) for one in recording.packed]
    assert list(read.entries()) == list(recording.entries())
    assert read.source == recording.source
    assert (read.redacted, read.notes) == (False, [])


def test_fields_of_newer_versions_survive(tmp_path: Path) -> None:
    import msgpack

    body = msgpack.packb({**msgpack.unpackb(encode(builders.load(1.0))), "of_tomorrow": [1.5, "x"]})
    path = tmp_path / "new.jsonl"
    files.write(path, Recording(RecordingSource("suite"), [PackedMessage(1, "load", body)]))
    assert msgpack.unpackb(files.read(path).packed[0].body)["of_tomorrow"] == [1.5, "x"]


def test_without_text_only_lengths_and_times_remain(tmp_path: Path) -> None:
    path = written(tmp_path, without_text=True)
    text = path.read_text()
    assert "4711" not in text, "the seed, which would confirm a guessed text"
    lists = re.findall(r'"(?:prompt|draft|tokens|stop_ids)":\[([\d,]*)\]', text)
    assert lists
    assert {token for found in lists for token in found.split(",")} <= {"0", ""}
    read = files.read(path)
    assert read.redacted
    before = read_sessions(recorded.recording(recorded.sent()).entries())
    after = read_sessions(read.entries())
    for session_id, session in before.items():
        one, other = timeline(session), timeline(after[session_id])
        assert one.parts == other.parts
        assert [len(r.draft) for r in one.rounds] == [len(r.draft) for r in other.rounds]
        assert [(r.accepted, len(r.tokens), r.trimmed) for r in one.rounds] == [
            (r.accepted, len(r.tokens), r.trimmed) for r in other.rounds
        ]
    with pytest.raises(RecordingError, match="without text and tokens, so it cannot be used to verify"):
        read.refuse_redacted("verify")


def test_a_redacted_recording_stays_marked_when_it_is_written_again(tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    files.write(again, files.read(written(tmp_path, without_text=True)))
    assert files.read(again).redacted


def test_no_kind_of_message_keeps_a_token() -> None:
    """Redaction covers every field of token ids of every message, also of messages that are added later."""
    samples = {type(message): message for _, _, message in recorded.sent()}
    carrying = [
        kind
        for kind in MESSAGES.values()
        if "TokenId" in repr(kind.__annotations__) or any("Job" in str(note) for note in kind.__annotations__.values())
    ]
    assert Generate in carrying
    assert Result in carrying
    for kind in carrying:
        whole = _filled(samples[kind].model_dump())
        message = redacted(kind.model_validate(whole))
        assert str(SECRET) not in message.model_dump_json(), kind
        assert redacted(message) == message


def _filled(fields: object, name: str = "") -> object:
    """The fields with every list of token ids filled with the secret token."""
    if isinstance(fields, dict):
        return {key: _filled(value, key) for key, value in fields.items()}
    if isinstance(fields, list) and fields and isinstance(fields[0], dict):
        return [_filled(one) for one in fields]
    if isinstance(fields, list) and name not in ("acceptance", "left_out", "committed_in", "sources"):
        return [SECRET] * max(2, len(fields))
    return fields


@given(st.lists(st.integers(0, 2**31 - 1), max_size=9), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9))
def test_lengths_survive_redaction(draft: list[int], prompt: list[int]) -> None:
    verify = redacted(recorded.verify(recorded.A, 0, 1, draft))
    generate = redacted(recorded.generate(prompt=prompt))
    assert isinstance(verify, Verify)
    assert isinstance(generate, Generate)
    assert verify.draft == [0] * len(draft)
    assert generate.prompt == [0] * len(prompt)


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:20])
    read = files.read(path)
    assert len(read.packed) == 5
    assert any("cut off after line 7" in note and "5 messages were read" in note for note in read.notes)
    assert any("could not be read: line 7" in note for note in read.notes)


def test_a_compressed_file_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = written(tmp_path, "recording.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-100])
    read = files.read(path)
    assert any("cut off" in note for note in read.notes)
    assert len(read.packed) < len(recorded.sent())


def test_broken_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    lines[3], lines[4] = "nonsense\n", '{"at_us": "late", "key": "verify", "message": {}}\n'
    path.write_text("".join(lines))
    read = files.read(path)
    assert len(read.packed) == len(recorded.sent()) - 2
    assert read.notes == [f"{path}: skipped what could not be read: line 4 and 1 more"]


def test_a_file_with_missing_lines_is_reported(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[5:]))
    assert any("it was changed" in note for note in files.read(path).notes)


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content in ("", "dear diary", "[1]", '{"a": 1}', '{"wisp_journal": 1}'):
        path.write_text(content)
        with pytest.raises(RecordingError, match="is no recording by `wisp journal export`"):
            files.read(path)
    path.write_text('{"wisp_journal": 2, "source": {"namespace": "x"}}\n')
    with pytest.raises(RecordingError, match="version 2 of the format, and this wisp reads version 1"):
        files.read(path)
    with pytest.raises(RecordingError, match="cannot read the recording"):
        files.read(tmp_path / "missing.jsonl")
    binary = tmp_path / "picture.gz"
    binary.write_bytes(gzip.compress(b"\xff\xfe\x00")[:-4])
    with pytest.raises(RecordingError, match="no recording"):
        files.read(binary)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"cannot write the recording to .*No such file"):
        files.write(tmp_path / "nowhere" / "x.jsonl", recorded.recording([]))


def test_unknown_messages_and_hidden_states_are_left_out(tmp_path: Path) -> None:
    states = HiddenStates(session="s", round=0, start=0, count=1, size=2, rows=b"\0" * 4)
    recording = recorded.recording([*recorded.sent(), (200.0, "hidden.d1", states)])
    recording.packed.append(PackedMessage(1, "verify", b"garbage"))
    path = tmp_path / "x.jsonl"
    assert files.write(path, recording) == (len(recorded.sent()), 2)
    assert json.loads(path.read_text().splitlines()[-1]) == {"entries": len(recorded.sent()), "left_out": 2}
