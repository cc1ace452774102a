"""Spans of the verifier: of each traced job of a batch, and of each report of a traced run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.verifier.core.replies import JobReply
from services.verifier.core.runs import RunTable
from shared.messages import Batch, Result, Status
from shared.runtime import tracing
from shared.runtime.tracing import Span, Value

MOST_LINKS = 32
"""Links from a batch to the other sessions in it."""


@dataclass
class BatchSpans:
    """The open spans of a batch's traced jobs, by session."""

    jobs: dict[str, Span] = field(default_factory=dict)
    rounds: dict[str, Span] = field(default_factory=dict)
    """The spans of their rounds, in the drafters."""

    @classmethod
    def begin(cls, batch: Batch, verifier_id: str) -> BatchSpans:
        """Start the spans of a batch that has arrived, in the context of its message.

        The first span has links to the rounds of the other sessions in the batch, and these have a link to it.
        """
        opened = cls(rounds=tracing.session_spans())
        for job in batch.jobs:
            if (round_span := opened.rounds.get(job.session)) is None:
                continue
            attributes: dict[str, Value] = {
                "wisp.session": job.session,
                "wisp.round": job.round,
                "wisp.base_len": job.base_len,
                "wisp.batch": batch.batch,
                "wisp.batch.jobs": len(batch.jobs),
                "wisp.batch.predicted_ms": batch.predicted_ms,
                "wisp.verifier": verifier_id,
            }
            if job.prefill_to is not None:
                attributes["wisp.prefill_to"] = job.prefill_to
            links = list(opened.jobs.values())[:1] or [
                other for session_id, other in opened.rounds.items() if session_id != job.session
            ]
            name = "verify" if job.prefill_to is None else "prefill"
            span = round_span.child(name, attributes, links=links[:MOST_LINKS], kind="CONSUMER")
            if span:
                opened.jobs[job.session] = span
        return opened

    def event(self, name: str) -> None:
        """Add an event to the spans of all jobs."""
        for span in self.jobs.values():
            span.event(name)

    def end(self, replies: Sequence[JobReply] = ()) -> None:
        """End all spans. Jobs without a reply were dropped: their rounds are sent again."""
        results = {reply.result.session: reply.result for reply in replies if not reply.result.run}
        for session_id, span in self.jobs.items():
            result = results.get(session_id)
            if result is None:
                span.fail("dropped")
            else:
                if result.error is not None:
                    span.fail(result.error.code)
                span.set(_outcome(result))
                if (computed := max(0, result.new_tokens - result.trimmed_to - 1)) > 0:
                    # Tokens before the draft: of a prompt, or of a session whose KV was not here.
                    span.rename("prefill")
                    span.set({"wisp.prefilled": computed})
            span.end()
        self.jobs = {}


class RunSpans:
    """The traced runs of a verifier. False while there are none."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[Span, int]] = {}
        """By session: the span of the round that granted the run, and the time of the last report."""

    def __bool__(self) -> bool:
        return bool(self._runs)

    def begin(self, session_id: str, round_span: Span) -> None:
        """Note that a traced session's run begins."""
        self._runs[session_id] = round_span, time.time_ns()

    def reported(self, replies: Sequence[JobReply], runs: RunTable) -> None:
        """Record the steps up to these reports, and forget the runs that are over."""
        now_ns = time.time_ns()
        for result in (reply.result for reply in replies if reply.result.run):
            if (traced := self._runs.get(result.session)) is not None:
                round_span, since_ns = traced
                round_span.child("run steps", _outcome(result), start_ns=since_ns).end(at_ns=now_ns)
                self._runs[result.session] = round_span, now_ns
        for session_id in [session_id for session_id in self._runs if runs.get(session_id) is None]:
            del self._runs[session_id]


def _outcome(result: Result) -> Mapping[str, Value]:
    attributes: dict[str, Value] = {
        "wisp.status": result.status,
        "wisp.new_tokens": result.new_tokens,
        "wisp.model_ms": result.verify_ms,
        "wisp.cached": result.cached,
    }
    if result.status is Status.COMMITTED:
        attributes["wisp.tokens"] = len(result.tokens)
        attributes["wisp.verified"] = result.trimmed_to
        attributes["wisp.accepted"] = result.accepted_drafts
    if result.finish is not None:
        attributes["wisp.finish"] = result.finish
    return attributes
