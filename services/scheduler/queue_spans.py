"""Spans of the scheduler: the time of each traced round in the pool, up to each batch that contains it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shared.messages import Batch, Job, Verify
from shared.runtime import tracing
from shared.runtime.tracing import Headers, Span, Value

MOST_ROUNDS = 10_000
"""Most traced rounds that are kept. The oldest, probably of sessions that ended unnoticed, are dropped."""


@dataclass
class _TracedRound:
    """A session's latest round."""

    round: int
    drafter_id: str
    span: Span
    """The round's span, in its drafter."""
    since_ns: int
    """When the round came into the pool, or was put into its last batch."""


class QueueSpans:
    """The traced rounds of all sessions. False while there are none."""

    def __init__(self) -> None:
        self._rounds: dict[str, _TracedRound] = {}

    def __bool__(self) -> bool:
        return bool(self._rounds)

    def arrived(self, verify: Verify) -> None:
        """Note the arrival of a round, in the context of its message."""
        span = tracing.current()
        known = self._rounds.get(verify.session)
        if known is not None and (known.round, known.drafter_id) == (verify.round, verify.drafter):
            return  # sent again
        self._rounds.pop(verify.session, None)
        if span:
            self._rounds[verify.session] = _TracedRound(verify.round, verify.drafter, span, time.time_ns())
            if len(self._rounds) > MOST_ROUNDS:
                del self._rounds[next(iter(self._rounds))]

    def sent(self, batch: Batch, verifier_id: str) -> Headers:
        """Record the queueing of a batch's jobs; return the headers of its message."""
        now_ns = time.time_ns()
        spans = {}
        for job in batch.jobs:
            traced = self._rounds.get(job.session)
            if traced is None or traced.round != job.round:
                continue
            spans[job.session] = traced.span
            attributes = _attributes(batch, job, verifier_id)
            traced.span.child("queue", attributes, start_ns=traced.since_ns).end(at_ns=now_ns)
            traced.since_ns = now_ns
        return tracing.headers_of(spans)

    def forget(self, session_id: str) -> None:
        """Forget a session that has ended."""
        self._rounds.pop(session_id, None)


def _attributes(batch: Batch, job: Job, verifier_id: str) -> dict[str, Value]:
    attributes: dict[str, Value] = {
        "wisp.session": job.session,
        "wisp.round": job.round,
        "wisp.batch": batch.batch,
        "wisp.batch.jobs": len(batch.jobs),
        "wisp.batch.predicted_ms": batch.predicted_ms,
        "wisp.policy": batch.policy,
        "wisp.verifier": verifier_id,
        "wisp.drafted": job.drafted,
        "wisp.sent": len(job.draft),
        "wisp.waiting": batch.waiting,
    }
    if job.slack_ms is not None:
        attributes["wisp.slack_ms"] = job.slack_ms
    if job.reason:
        attributes["wisp.reason"] = job.reason
    if job.prefill_to is not None:
        attributes["wisp.prefill_to"] = job.prefill_to
    if job.run is not None:
        attributes["wisp.run_tokens"] = job.run.tokens
    return attributes
