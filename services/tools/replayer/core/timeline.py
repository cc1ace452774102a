"""Timelines: a session's rounds and the time that each phase of them took.

Times come from several clocks. A message that seems to arrive before it was sent counts as taking 0 ms, and a
`ClockInversion` names the two clocks.
"""

from __future__ import annotations

from collections.abc import Callable

from services.tools.replayer.core.sessions import RecordedJob, RecordedRound, RecordedRun, RecordedSession
from services.tools.replayer.core.timeline_records import (
    BatchTime,
    ClockInversion,
    Phase,
    RoundTime,
    RunReportTime,
    RunTime,
    Timeline,
)
from shared.messages import Status

CLOCK_TOLERANCE_MS = 0.05
"""Two processes on one machine may read its clock this far apart."""


Spend = Callable[[Phase, float], None]


class _ClockDifferences:
    """Durations between two clocks, never negative, and the largest disagreement of each pair."""

    def __init__(self) -> None:
        self.largest_ms: dict[tuple[str, str], float] = {}

    def between(self, sender: str, sent_ms: float | None, receiver: str, received_ms: float | None) -> float:
        """Return the milliseconds from one time to the other; 0 if one is unknown or the clocks disagree."""
        if sent_ms is None or received_ms is None:
            return 0.0
        ms = received_ms - sent_ms
        if ms < -CLOCK_TOLERANCE_MS and sender != receiver:
            self.largest_ms[sender, receiver] = max(self.largest_ms.get((sender, receiver), 0.0), -ms)
        return max(0.0, ms)

    def inversions(self) -> list[ClockInversion]:
        return [ClockInversion(*names, ms) for names, ms in sorted(self.largest_ms.items())]


def timeline(session: RecordedSession) -> Timeline:
    """Return the timeline of a session."""
    clocks = _ClockDifferences()
    generate, ended = session.generate, session.ended
    start_ms, end_ms = session.start_ms, session.end_ms
    rounds, parts = _rounds(session, start_ms, clocks)
    return Timeline(
        session=session.session_id,
        gateway=generate.gateway if generate else None,
        drafters=list(dict.fromkeys(round_.verify.drafter for round_ in session.rounds.values())),
        pool=session.pool,
        service_class=session.service_class,
        slo=session.slo,
        started_ms=start_ms,
        total_ms=None if start_ms is None or end_ms is None else max(0.0, end_ms - start_ms),
        prompt=generate.prompt if generate else None,
        max_tokens=generate.max_tokens if generate else None,
        tokens=len(session.output()),
        ending=_ending(session),
        attained=ended.attained if ended else None,
        ttft_ms=ended.ttft_ms if ended else None,
        tpot_ms=ended.tpot_ms if ended else None,
        rounds=rounds,
        runs=[_run(run, start_ms) for run in session.runs if run.reports],
        parts=parts,
        inversions=clocks.inversions(),
        notes=_notes(session),
    )


def _rounds(
    session: RecordedSession, start_ms: float | None, clocks: _ClockDifferences
) -> tuple[list[RoundTime], dict[str, float]]:
    """Return the rounds, and the session's time by phase."""
    totals: dict[str, float] = dict.fromkeys((phase.value for phase in Phase), 0.0)
    if session.generate is not None:
        totals[Phase.GATEWAY] = session.generate.elapsed_ms
    since_ms, sender = session.generate_ms, session.generate.gateway if session.generate else ""
    rounds = []
    runs = {run.after: run for run in session.runs if run.reports}
    for number in sorted(session.rounds):
        recorded = session.rounds[number]
        round_ = _round(recorded, since_ms, sender, start_ms, clocks)
        rounds.append(round_)
        for phase, ms in round_.parts.items():
            totals[phase] += ms
        if recorded.result_ms is not None:
            since_ms = recorded.result_ms
            sender = recorded.result.verifier if recorded.result else ""
        run = runs.get(number)
        if run is not None and since_ms is not None and run.sent_ms[-1] is not None:
            totals[Phase.RUN] += max(0.0, run.sent_ms[-1] - since_ms)
            since_ms = run.sent_ms[-1]
    if session.ended_ms is not None and rounds:
        gateway = session.generate.gateway if session.generate else "the gateway"
        totals[Phase.CLIENT] = clocks.between(sender, since_ms, gateway, session.ended_ms)
    return rounds, {phase: ms for phase, ms in totals.items() if ms > 0}


def _run(recorded: RecordedRun, start_ms: float | None) -> RunTime:
    first, last, last_ms = recorded.reports[0], recorded.reports[-1], recorded.sent_ms[-1]
    begun_ms = recorded.begun_ms
    return RunTime(
        after=recorded.after,
        base_len=first.base_len,
        start_ms=_since(begun_ms, start_ms),
        total_ms=None if begun_ms is None or last_ms is None else max(0.0, last_ms - begun_ms),
        verifier=first.verifier,
        tokens=[token for report in recorded.reports for token in report.tokens],
        verify_ms=sum(report.verify_ms for report in recorded.reports),
        reports=[
            RunReportTime(_since(at_ms, start_ms), len(report.tokens), list(report.copied), report.verify_ms)
            for report, at_ms in zip(recorded.reports, recorded.sent_ms, strict=True)
        ],
        finish=None if last.finish is None else str(last.finish),
    )


def _notes(session: RecordedSession) -> list[str]:
    notes = list(session.notes)
    if session.generate is None:
        notes.append("its beginning is not in the recording")
    if any(at is None for round_ in session.rounds.values() for at in round_.sent_ms):
        notes.append("some senders give no send time: the times of their messages are missing")
    return notes


def _ending(session: RecordedSession) -> str:
    ended, cancelled = session.ended, session.cancelled
    if ended is not None:
        reason = f" ({cancelled.reason})" if cancelled else ""
        return ended.reason + (f" ({ended.code})" if ended.code else reason)
    if cancelled is not None:
        return f"cancelled ({cancelled.reason})"
    errors = [round_.result.error for round_ in session.rounds.values() if round_.result and round_.result.error]
    if errors:
        return f"failed ({errors[-1].code})"
    return str(session.finish) if session.finish else "not ended in the recording"


def _round(
    recorded: RecordedRound,
    since_ms: float | None,
    sender: str,
    start_ms: float | None,
    clocks: _ClockDifferences,
) -> RoundTime:
    """Return a round that follows a message sent by `sender` at `since_ms`: the Generate or the previous result."""
    verify, result = recorded.verify, recorded.result
    parts, batches = _phases(recorded, since_ms, sender, start_ms, clocks)
    sent_ms, end_ms = recorded.sent_ms[0], recorded.result_ms
    begun_ms = since_ms if since_ms is not None else (None if sent_ms is None else sent_ms - verify.draft_ms)
    committed = result is not None and result.status is Status.COMMITTED
    accepted = result.accepted if result is not None and committed else 0
    verified = result.trimmed_to if result is not None and committed else 0
    tokens = list(result.tokens) if result is not None else []
    jobs = recorded.jobs
    last = jobs[-1].job if jobs and jobs[-1].job.prefill_to is None else None
    return RoundTime(
        round=verify.round,
        base_len=verify.base_len,
        start_ms=_since(begun_ms, start_ms),
        total_ms=None if end_ms is None or begun_ms is None else max(0.0, end_ms - begun_ms),
        parts=parts,
        attempts=len(recorded.sent_ms),
        draft=list(verify.draft),
        acceptance=list(verify.acceptance),
        verified=verified,
        accepted=accepted,
        trimmed=0 if last is None else len(verify.draft) - len(last.draft),
        tokens=tokens,
        own=len(tokens) - accepted,
        status="no result" if result is None else str(result.status),
        finish=None if result is None or result.finish is None else str(result.finish),
        error=result.error.message if result is not None and result.error else None,
        slack_ms=verify.slack_ms,
        price_ms=recorded.price_ms,
        batches=batches,
        left_out=list(recorded.left_out),
        repeated=recorded.repeated,
    )


def _phases(
    recorded: RecordedRound,
    since_ms: float | None,
    sender: str,
    start_ms: float | None,
    clocks: _ClockDifferences,
) -> tuple[dict[str, float], list[BatchTime]]:
    """Return a round's time by phase, and its batches."""
    verify, sent_ms, jobs = recorded.verify, recorded.sent_ms[0], recorded.jobs
    parts: dict[str, float] = {}

    def spend(phase: Phase, ms: float) -> None:
        if ms > 0:
            parts[phase.value] = parts.get(phase.value, 0.0) + ms

    before_ms = clocks.between(sender, since_ms, verify.drafter, sent_ms) if since_ms is not None else verify.draft_ms
    drafting_ms = min(verify.draft_ms, before_ms)
    spend(Phase.DRAFT, drafting_ms)
    spend(Phase.TO_DRAFTER, before_ms - drafting_ms)
    if jobs:
        first = jobs[0]
        arrived_ms = None if first.at_ms is None else first.at_ms - first.job.queue_ms
        spend(Phase.TO_SCHEDULER, clocks.between(verify.drafter, sent_ms, first.scheduler_id, arrived_ms))
        spend(Phase.POOL, first.job.queue_ms)
    batches = []
    chunk_ms: float | None = None
    for job in jobs:
        if chunk_ms is not None:
            spend(Phase.POOL, clocks.between(job.verifier_id, chunk_ms, job.scheduler_id, job.at_ms))
        batches.append(_batch(job, start_ms, clocks, spend))
        chunk_ms = job.result_ms
    return parts, batches


def _batch(recorded: RecordedJob, start_ms: float | None, clocks: _ClockDifferences, spend: Spend) -> BatchTime:
    job, result = recorded.job, recorded.result
    behind_ms = 0.0
    if result is not None:
        span_ms = clocks.between(recorded.scheduler_id, recorded.at_ms, recorded.verifier_id, recorded.result_ms)
        model_ms = min(result.verify_ms, span_ms) if recorded.result_ms is not None else result.verify_ms
        if recorded.free_ms is not None and recorded.at_ms is not None:
            behind_ms = min(max(0.0, recorded.free_ms - recorded.at_ms), span_ms - model_ms)
        spend(Phase.BEHIND, behind_ms)
        spend(Phase.MODEL, model_ms)
        spend(Phase.VERIFIER, span_ms - model_ms - behind_ms)
    return BatchTime(
        batch=recorded.batch_id,
        verifier=recorded.verifier_id,
        policy=recorded.policy,
        reason=job.reason,
        mates=recorded.mates,
        waiting=recorded.waiting,
        predicted_ms=recorded.predicted_ms,
        sent_ms=_since(recorded.at_ms, start_ms),
        result_ms=_since(recorded.result_ms, start_ms),
        verify_ms=result.verify_ms if result else None,
        behind_ms=behind_ms,
        behind=recorded.before if behind_ms > 0 else None,
        slack_ms=job.slack_ms,
        queue_ms=job.queue_ms,
        draft=len(job.draft),
        prefill_to=job.prefill_to,
        new_tokens=result.new_tokens if result else None,
    )


def _since(at_ms: float | None, start_ms: float | None) -> float | None:
    return None if at_ms is None or start_ms is None else max(0.0, at_ms - start_ms)
