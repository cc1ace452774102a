"""A recording as a Chrome trace (Trace Event Format, JSON object), which Perfetto and speedscope open. Pure but
for writing the file.

Each service is a process. A session has a row of its own in its gateway, its drafter and the scheduler; a verifier has
one row of batches. Arrows lead from a round's draft to its wait, its batch and the next draft.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from services.tools.replayer.core.recording import RecordingError
from services.tools.replayer.core.sessions import Life, Round, Sent

Event = dict[str, Any]


class _Rows:
    """Process and thread ids of names, and the events that tell them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[int, str], int] = {}

    def of(self, process: str, thread: str) -> dict[str, int]:
        """The ids, as an event has them."""
        if process not in self._processes:
            self._processes[process] = len(self._processes) + 1
            self._name("process_name", self._processes[process], 0, process)
        pid = self._processes[process]
        if (pid, thread) not in self._threads:
            tid = len(self._threads) + 1
            self._threads[pid, thread] = tid
            self._name("thread_name", pid, tid, thread)
        return {"pid": pid, "tid": self._threads[pid, thread]}

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self.events.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}})


def trace_events(lives: Iterable[Life]) -> list[Event]:
    """The events, times in microseconds since the earliest of these lives began."""
    known = [life for life in lives if life.start_ms is not None and (life.generate or life.rounds)]
    zero_ms = min((life.start_ms or 0.0 for life in known), default=0.0)
    rows = _Rows()
    events: list[Event] = []
    batches: dict[str, list[tuple[str, Sent]]] = {}
    arrows = count(1)

    def us(at_ms: float) -> int:
        # Whole numbers: viewers that add start and duration in floating point would find that pieces overlap.
        return round((at_ms - zero_ms) * 1000)

    def piece(name: str, row: dict[str, int], start_ms: float, end_ms: float, **args: Any) -> None:
        begin = us(start_ms)
        duration = max(0, us(end_ms) - begin)
        events.append({"ph": "X", "cat": "wisp", "name": name, **row, "ts": begin, "dur": duration, "args": args})

    def arrow(from_row: dict[str, int], from_ms: float, to_row: dict[str, int], to_ms: float) -> None:
        number = next(arrows)
        events.append({"ph": "s", "cat": "wisp", "name": "round", "id": number, **from_row, "ts": us(from_ms)})
        to_us = max(us(to_ms), us(from_ms))
        events.append({"ph": "f", "bp": "e", "cat": "wisp", "name": "round", "id": number, **to_row, "ts": to_us})

    for life in known:
        gateway = life.generate.gateway if life.generate else (life.rounds and _any(life).verify.gateway) or "gateway"
        row = rows.of(gateway, life.session)
        start_ms, end_ms = life.start_ms or 0.0, life.end_ms or 0.0
        piece(
            f"session {life.session}",
            row,
            start_ms,
            end_ms,
            service_class=life.service_class,
            tokens=len(life.output()),
            rounds=len(life.rounds),
        )
        for number in sorted(life.rounds):
            one = life.rounds[number]
            _round(life, one, rows, piece, arrow, batches)
    for name, jobs in batches.items():
        _batch(name, jobs, rows, piece)
    return rows.events + _apart(events)


def _apart(events: list[Event]) -> list[Event]:
    """In order of time, and the pieces of a row one after the other: clocks and roundings may let them overlap, which
    viewers take for nesting."""
    ends: dict[tuple[int, int], int] = {}
    events = sorted(events, key=lambda event: event["ts"])
    for event in events:
        if event["ph"] == "X":
            row = event["pid"], event["tid"]
            end = event["ts"] + event["dur"]
            event["ts"] = max(event["ts"], ends.get(row, 0))
            event["dur"] = max(0, end - event["ts"])
            ends[row] = event["ts"] + event["dur"]
    return sorted(events, key=lambda event: event["ts"])


def _any(life: Life) -> Round:
    return next(iter(life.rounds.values()))


def _round(life: Life, one: Round, rows: _Rows, piece: Any, arrow: Any, batches: dict[str, list[Any]]) -> None:
    verify, sent_ms = one.verify, one.sent_ms[0]
    if sent_ms is None:
        return
    drafter = rows.of(verify.drafter, life.session)
    draft_ms = max(verify.draft_ms, 0.001)
    name = f"draft {len(verify.draft)}"
    piece(name, drafter, sent_ms - draft_ms, sent_ms, round=verify.round, base_len=verify.base_len)
    if one.result_ms is not None and one.result is not None:
        piece(
            f"round {verify.round}",
            drafter,
            sent_ms,
            max(sent_ms, one.result_ms),
            accepted=one.result.accepted,
            verified=one.result.trimmed_to,
            tokens=len(one.result.tokens),
            attempts=len(one.sent_ms),
        )
    from_row, from_ms = drafter, sent_ms - draft_ms / 2
    for sent in one.jobs:
        batches.setdefault(sent.batch, []).append((life.session, sent))
        if sent.at_ms is None:
            continue
        waits = rows.of(sent.scheduler, life.session)
        since_ms = max(sent_ms, sent.at_ms - sent.job.queue_ms) if sent is one.jobs[0] else max(sent_ms, from_ms)
        piece(
            f"waits, round {verify.round}",
            waits,
            min(since_ms, sent.at_ms),
            sent.at_ms,
            reason=sent.job.reason,
            slack_ms=sent.job.slack_ms,
            left_out=[f"{batch}: {why}" for batch, why in one.left_out],
        )
        middle_ms = (min(since_ms, sent.at_ms) + sent.at_ms) / 2
        arrow(from_row, from_ms, waits, middle_ms)
        if sent.result is not None and sent.result_ms is not None:
            verifier = rows.of(sent.verifier, "batches")
            inside_ms = sent.result_ms - sent.result.verify_ms / 2
            arrow(waits, middle_ms, verifier, inside_ms)
            from_row, from_ms = verifier, inside_ms


def _batch(name: str, jobs: Sequence[tuple[str, Sent]], rows: _Rows, piece: Any) -> None:
    done = [sent for _, sent in jobs if sent.result is not None and sent.result_ms is not None]
    if not done:
        return
    # Results of a batch are sent one after the other; the first tells best when the model was done.
    first = min(done, key=lambda sent: sent.result_ms or 0.0)
    assert first.result is not None
    assert first.result_ms is not None
    piece(
        f"batch of {len(first.mates) + 1}",
        rows.of(first.verifier, "batches"),
        first.result_ms - first.result.verify_ms,
        first.result_ms,
        batch=name,
        policy=first.policy,
        predicted_ms=first.predicted_ms,
        verify_ms=first.result.verify_ms,
        jobs=[f"{session}: {sent.job.reason}" for session, sent in jobs],
    )


def write_trace(path: Path, lives: Sequence[Life]) -> None:
    """Write the trace of these lives. Raises RecordingError where that cannot be done, or there is nothing to show."""
    events = trace_events(lives)
    if not events:
        raise RecordingError("nothing to trace: no session with times in the recording")
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file, separators=(",", ":"), allow_nan=False)
    except OSError as error:
        raise RecordingError(f"cannot write the trace to {path}: {error.strerror or error}") from error
