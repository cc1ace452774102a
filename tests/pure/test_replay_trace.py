"""The trace of `wisp replay --trace`: events that Perfetto and chrome://tracing accept and show rightly."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import recorded
from recorded import A

from services.tools.replayer.core.recording import RecordingError
from services.tools.replayer.core.sessions import RecordedSession, read_sessions
from services.tools.replayer.core.trace import trace_events
from services.tools.replayer.files import write_trace


def sessions(sent: list[recorded.Sent] | None = None) -> list[RecordedSession]:
    recording = recorded.recording(recorded.sent() if sent is None else sent)
    return list(read_sessions(recording.entries()).values())


def names(events: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[str, str]]:
    """(process, thread) by (pid, tid)."""
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    threads = [event for event in events if event["name"] == "thread_name"]
    return {(event["pid"], event["tid"]): (processes[event["pid"]], event["args"]["name"]) for event in threads}


def test_every_slice_has_its_row_and_its_time() -> None:
    events = trace_events(sessions())
    rows = names(events)
    slices = [event for event in events if event["ph"] == "X"]
    found = {(rows[event["pid"], event["tid"]], event["name"], event["ts"], event["dur"]) for event in slices}
    assert (("g1", A), f"session {A}", 0.0, 155_000.0) in found
    assert (("d1", A), "draft 4", 65_000.0, 10_000.0) in found
    assert (("d1", A), "round 1", 75_000.0, 75_000.0) in found
    assert (("s1", A), "waits, round 1", 77_000.0, 8_000.0) in found
    assert (("v1", "batches"), "batch of 2", 115_000.0, 35_000.0) in found
    [batch] = [event for event in slices if event["args"].get("batch") == "s1-3"]
    assert batch["args"]["jobs"][0] == f"{A}: due soon"


def test_arrows_begin_and_end_inside_slices_of_their_rows() -> None:
    events = trace_events(sessions())
    slices = [event for event in events if event["ph"] == "X"]
    ends: defaultdict[int, list[str]] = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            ends[event["id"]].append(event["ph"])
            assert any(
                (slice_["pid"], slice_["tid"]) == (event["pid"], event["tid"])
                and slice_["ts"] <= event["ts"] <= slice_["ts"] + slice_["dur"]
                for slice_ in slices
            ), event
    assert ends
    assert all(kinds == ["s", "f"] for kinds in ends.values())


def test_slices_of_a_row_do_not_overlap_although_clocks_disagree() -> None:
    sent = [
        (at - 30 if at is not None and key in ("verify", "result.d1") else at, key, m) for at, key, m in recorded.sent()
    ]
    ends: dict[tuple[int, int], float] = {}
    for event in trace_events(sessions(sent)):
        if event["ph"] == "X":
            row = event["pid"], event["tid"]
            assert event["ts"] >= ends.get(row, 0.0)
            assert event["dur"] >= 0
            assert isinstance(event["ts"], int)
            assert isinstance(event["dur"], int)
            ends[row] = event["ts"] + event["dur"]


def test_the_file_has_the_json_object_of_the_trace_event_format(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, sessions())
    found = json.loads(path.read_text())
    assert found["displayTimeUnit"] == "ms"
    times = [event["ts"] for event in found["traceEvents"] if event["ph"] != "M"]
    assert times == sorted(times)
    assert {event["ph"] for event in found["traceEvents"]} == {"M", "X", "s", "f"}


def test_an_empty_trace_and_a_missing_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="nothing to trace"):
        write_trace(tmp_path / "trace.json", sessions([(None, key, message) for _, key, message in recorded.sent()]))
    with pytest.raises(RecordingError, match="cannot write the trace"):
        write_trace(tmp_path / "nowhere" / "trace.json", sessions())
