"""Recorded sessions as a Chrome trace (Trace Event Format), which Perfetto and speedscope open.

Each service is a process. A session has a row in its gateway, its drafter and the scheduler; a verifier has one row of
batches. Arrows lead from a round's draft to its wait and on to its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from services.tools.replayer.core.sessions import RecordedJob, RecordedRound, RecordedSession

Event = dict[str, Any]
Row = dict[str, int]
"""`pid` and `tid` of an event."""


def trace_events(sessions: Iterable[RecordedSession]) -> list[Event]:
    """Return the events, with times in microseconds since the earliest session began."""
    timed = [session for session in sessions if session.start_ms is not None and (session.generate or session.rounds)]
    builder = _TraceBuilder(min((session.start_ms or 0.0 for session in timed), default=0.0))
    for session in timed:
        builder.add_session(session)
    return builder.finish()


class _Rows:
    """Process and thread ids by name, and the metadata events that name them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[int, str], int] = {}

    def of(self, process: str, thread: str) -> Row:
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


class _TraceBuilder:
    """Collects the events of sessions and batches. `zero_ms` is time 0 of the trace."""

    def __init__(self, zero_ms: float) -> None:
        self._zero_ms = zero_ms
        self._rows = _Rows()
        self._events: list[Event] = []
        self._arrows = count(1)
        self._batches: dict[str, list[tuple[str, RecordedJob]]] = {}

    def add_session(self, session: RecordedSession) -> None:
        if session.generate is not None:
            gateway = session.generate.gateway
        else:
            gateway = next(iter(session.rounds.values())).verify.gateway or "gateway"
        self._slice(
            f"session {session.session_id}",
            self._rows.of(gateway, session.session_id),
            session.start_ms or 0.0,
            session.end_ms or 0.0,
            service_class=session.service_class,
            tokens=len(session.output()),
            rounds=len(session.rounds),
        )
        for number in sorted(session.rounds):
            self._add_round(session.session_id, session.rounds[number])
        for run in session.runs:
            if run.reports and run.begun_ms is not None and (end_ms := run.sent_ms[-1]) is not None:
                self._slice(
                    f"run, {sum(len(report.tokens) for report in run.reports)} tokens",
                    self._rows.of(run.reports[0].verifier, session.session_id),
                    run.begun_ms,
                    end_ms,
                    reports=len(run.reports),
                    verify_ms=sum(report.verify_ms for report in run.reports),
                )

    def finish(self) -> list[Event]:
        """Add the batches of all sessions and return the events."""
        for name, jobs in self._batches.items():
            self._add_batch(name, jobs)
        return self._rows.events + _without_overlaps(self._events)

    def _add_round(self, session_id: str, round_: RecordedRound) -> None:
        verify, sent_ms = round_.verify, round_.sent_ms[0]
        if sent_ms is None:
            return
        drafter = self._rows.of(verify.drafter, session_id)
        draft_ms = max(verify.draft_ms, 0.001)
        name = f"draft {len(verify.draft)}"
        self._slice(name, drafter, sent_ms - draft_ms, sent_ms, round=verify.round, base_len=verify.base_len)
        if round_.result_ms is not None and round_.result is not None:
            self._slice(
                f"round {verify.round}",
                drafter,
                sent_ms,
                max(sent_ms, round_.result_ms),
                accepted=round_.result.accepted,
                verified=round_.result.trimmed_to,
                tokens=len(round_.result.tokens),
                attempts=len(round_.sent_ms),
            )
        from_row, from_ms = drafter, sent_ms - draft_ms / 2
        for job in round_.jobs:
            self._batches.setdefault(job.batch_id, []).append((session_id, job))
            if job.at_ms is None:
                continue
            scheduler = self._rows.of(job.scheduler_id, session_id)
            since_ms = max(sent_ms, job.at_ms - job.job.queue_ms if job is round_.jobs[0] else from_ms)
            waits_from_ms = min(since_ms, job.at_ms)
            self._slice(
                f"waits, round {verify.round}",
                scheduler,
                waits_from_ms,
                job.at_ms,
                reason=job.job.reason,
                slack_ms=job.job.slack_ms,
                left_out=[f"{batch_id}: {reason}" for batch_id, reason in round_.left_out],
            )
            middle_ms = (waits_from_ms + job.at_ms) / 2
            self._arrow(from_row, from_ms, scheduler, middle_ms)
            if job.result is not None and job.result_ms is not None:
                verifier = self._rows.of(job.verifier_id, "batches")
                inside_ms = job.result_ms - job.result.verify_ms / 2
                self._arrow(scheduler, middle_ms, verifier, inside_ms)
                from_row, from_ms = verifier, inside_ms

    def _add_batch(self, name: str, jobs: Sequence[tuple[str, RecordedJob]]) -> None:
        done = [job for _, job in jobs if job.result is not None and job.result_ms is not None]
        if not done:
            return
        # A verifier sends the results of a batch one by one; the first is closest to the end of the forward pass.
        first = min(done, key=lambda job: job.result_ms or 0.0)
        assert first.result is not None
        assert first.result_ms is not None
        self._slice(
            f"batch of {len(first.mates) + 1}",
            self._rows.of(first.verifier_id, "batches"),
            first.result_ms - first.result.verify_ms,
            first.result_ms,
            batch=name,
            policy=first.policy,
            predicted_ms=first.predicted_ms,
            verify_ms=first.result.verify_ms,
            jobs=[f"{session_id}: {job.job.reason}" for session_id, job in jobs],
        )

    def _us(self, at_ms: float) -> int:
        # Whole numbers: viewers that add start and duration in floating point would see slices overlap.
        return round((at_ms - self._zero_ms) * 1000)

    def _slice(self, name: str, row: Row, start_ms: float, end_ms: float, **args: Any) -> None:
        begin = self._us(start_ms)
        duration = max(0, self._us(end_ms) - begin)
        self._events.append({"ph": "X", "cat": "wisp", "name": name, **row, "ts": begin, "dur": duration, "args": args})

    def _arrow(self, from_row: Row, from_ms: float, to_row: Row, to_ms: float) -> None:
        number = next(self._arrows)
        from_us = self._us(from_ms)
        to_us = max(self._us(to_ms), from_us)
        self._events.append({"ph": "s", "cat": "wisp", "name": "round", "id": number, **from_row, "ts": from_us})
        self._events.append({"ph": "f", "bp": "e", "cat": "wisp", "name": "round", "id": number, **to_row, "ts": to_us})


def _without_overlaps(events: list[Event]) -> list[Event]:
    """Return the events in order of time, with the slices of each row moved apart.

    Clocks that differ and rounding may let slices overlap, which viewers take for nesting.
    """
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
