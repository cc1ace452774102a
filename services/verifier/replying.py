"""The replies to a step: its tokens are committed, its results published, and sessions that have ended released."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from services.verifier import metrics
from services.verifier.core import replies
from services.verifier.core.replies import BatchReplies, JobReply, OpenCommit
from services.verifier.core.runs import RunReport, RunTable
from services.verifier.handoff import Handoff
from services.verifier.job_spans import RunSpans
from services.verifier.membership import Membership
from services.verifier.sessions import SessionTable
from services.verifier.steps import StepWork
from shared.broker import topology
from shared.broker.client import Broker
from shared.errors import BrokersError, Fenced
from shared.runtime import logging
from shared.state.commits import Committed
from shared.state.store import Store


class Replying:
    """Commits and replies to steps, each while later ones compute."""

    def __init__(
        self,
        membership: Membership,
        sessions: SessionTable,
        runs: RunTable,
        handoff: Handoff,
        broker: Broker,
        store: Store,
    ) -> None:
        self._membership = membership
        self._sessions = sessions
        self._runs = runs
        self._handoff = handoff
        self._broker = broker
        self._store = store
        self._run_spans = RunSpans()
        self._replies: set[asyncio.Task[None]] = set()
        self._log = logging.get()

    @property
    def idle(self) -> bool:
        """True if every step is replied to."""
        return not self._replies

    def reply_soon(self, work: StepWork) -> None:
        """Reply to a step that has been computed."""
        for job in work.started:
            if work.spans is not None and (round_span := work.spans.rounds.get(job.session)):
                self._run_spans.begin(job.session, round_span)
        if work.batch is None and not work.reports:
            return
        reply = asyncio.create_task(self._reply(work))
        self._replies.add(reply)
        reply.add_done_callback(partial(self._replied, work))

    def _replied(self, work: StepWork, reply: asyncio.Task[None]) -> None:
        """Report the runs that ended while a reply held them back. After a fault, forget the step's sessions."""
        self._replies.discard(reply)
        if not reply.cancelled() and (error := reply.exception()) is not None:
            self._log.error("replying to a step failed", error=repr(error), exc_info=error)
            jobs = [*(job for job, _ in work.tasks), *work.stale]
            self._forget([job.session for job in jobs] + [report.commit.session_id for report in work.reports])
        self.reply_soon(StepWork(reports=self._runs.due(time.monotonic() * 1000, between_steps=False)))

    async def _reply(self, work: StepWork) -> None:
        """Commit, publish the results, and last release what has ended.

        If the lease has ended, nothing is committed or published.
        """
        answering = self._collect(work)
        answers = await self._commit(work, answering.open)
        if answers is None:
            if work.spans is not None:
                work.spans.end()
            return
        work.event("committed")
        reported, answers = answers[: len(work.reports)], answers[len(work.reports) :]
        ended = self._apply(answering.open, answers)
        results = []
        for report, answer in zip(work.reports, reported, strict=True):
            ended += self._apply_report(report, answer)
            results.append(answering.reported(report, answer))
        settled = answering.settle(answers)
        await self._publish([*results, *settled])
        self._log.debug("results sent")
        if work.spans is not None:
            work.spans.end(settled)
        if self._run_spans:
            self._run_spans.reported(results, self._runs)
        await self.release(ended)

    def _collect(self, work: StepWork) -> BatchReplies:
        answering = BatchReplies(
            self._membership.verifier_id,
            replies.RUN_BATCH if work.batch is None else work.batch.batch,
            work.verify_ms,
            self._membership.arithmetic,
            self._runs,
            0.0 if work.batch is None else work.batch.predicted_ms,
        )
        for job, failure in work.failed:
            answering.fail(job, failure)
        for job in work.stale:
            answering.ask(job)
        for (job, task), outcome in zip(work.tasks, work.outcomes, strict=False):
            if outcome.error is not None:
                self._log.warning("job refused", session=job.session, error=repr(outcome.error))
            answering.verified(job, task, outcome)
        return answering

    async def _commit(self, work: StepWork, commits: Sequence[OpenCommit]) -> list[Committed] | None:
        """Return the commit script's answers to the step's reports and commits.

        None if Redis is unreachable or the lease has ended.
        """
        # The lease of the grants and not the present one: this process may have been frozen since the step began.
        granted = work.reports[0].run.lease if work.reports else 0
        lease = granted if work.batch is None else work.batch.lease or granted
        try:
            answers = await self._store.commit(
                self._membership.verifier_id,
                [*(report.commit for report in work.reports), *(one.commit for one in commits)],
                lease=lease,
                arithmetic=self._membership.arithmetic,
            )
        except (BrokersError, Fenced) as error:
            # An unreachable Redis may have committed or not.
            self._log.warning("results dropped", error=str(error))
            self._forget([one.job.session for one in commits] + [report.commit.session_id for report in work.reports])
            return None
        self._log.debug("batch committed")
        return answers

    def _forget(self, session_ids: Sequence[str]) -> None:
        """Forget runs and tokens that may be committed or not.

        The drafters send the rounds again, and the commit script answers with what is committed.
        """
        self._runs.release(session_ids)
        for session_id in session_ids:
            self._sessions.drop(session_id)

    def _apply(self, commits: Sequence[OpenCommit], answers: Sequence[Committed]) -> list[str]:
        """Update the sessions from the answers; return those that have ended."""
        ended = []
        for one, answer in zip(commits, answers, strict=True):
            metrics.COMMITS.labels(answer.outcome).inc()
            session_id = one.job.session
            run = self._runs.get(session_id)
            if answer.ended:
                ended.append(session_id)
            elif self._sessions.apply(session_id, answer):
                self._handoff.on_commit(session_id, self._sessions.tokens(session_id))
                if run is not None:
                    run.confirmed = True
            elif run is None or not run.confirmed:
                self._runs.release([session_id])
                self._sessions.drop(session_id)
        return ended

    def _apply_report(self, report: RunReport, answer: Committed) -> list[str]:
        """Update a run and its session from the answer to a report; return the session if it has ended."""
        metrics.COMMITS.labels(answer.outcome).inc()
        session_id = report.commit.session_id
        if answer.ended:
            self._runs.drop(report.run)
            return [session_id]
        if self._sessions.apply(session_id, answer):
            self._handoff.on_commit(session_id, self._sessions.tokens(session_id))
            self._runs.reported(report)
        else:
            # Somebody else has committed tokens of this session.
            self._runs.drop(report.run)
            self._sessions.drop(session_id)
        return []

    async def release(self, session_ids: Sequence[str]) -> None:
        """Forget sessions that have ended or moved, with their runs, and release their KV."""
        self._runs.release(session_ids)
        await self._sessions.release(session_ids)

    async def _publish(self, answers: Sequence[JobReply]) -> None:
        """Publish each result once; the broker makes the copies for drafter, gateway and scheduler.

        Results with the same receivers go together.
        """
        for group in replies.groups(answers):
            for reply in group:
                metrics.count_tokens(reply.result)
                if reply.result.error is not None:
                    metrics.JOBS_REFUSED.labels(reply.result.error.code).inc()
                for states in reply.hidden:
                    metrics.HIDDEN_BYTES.inc(len(states.rows) + len(states.scales))
                    await self._broker.publish(states, topology.result(reply.job.drafter))
            receivers = (*map(topology.result, group[0].receivers), topology.RESULT_SCHEDULER)
            await self._broker.publish_group([reply.result for reply in group], receivers[0], cc=receivers[1:])
