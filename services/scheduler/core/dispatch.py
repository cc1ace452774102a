"""The scheduler's decisions as one synchronous object: messages in, batches out, without a clock or I/O.

The service and `services.tools.replayer.core.what_if` (recorded requests in virtual time) drive the same class. Every
time is `now_ms` on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.core import load, pacing, runs
from services.scheduler.core.batching import BatchLimits, BatchPlan, ChosenRound
from services.scheduler.core.fleet import VerifierFleet
from services.scheduler.core.load import LoadAverages
from services.scheduler.core.policies import POLICIES, PolicyOptions, Situation
from services.scheduler.core.pool import ActiveSession, InFlight, PendingRound, VerifierState
from services.scheduler.core.verifier_runs import ONE_TOKEN, RunningRun
from shared.messages import SILENT_MS, Batch, CostModel, Heartbeat, Job, Load, Result, RunGrant, Status, Verify

LOST_FACTOR = 5.0
LOST_SLACK_MS = 5000.0
"""A batch without results is lost after five times its predicted time and this much more."""
FORGOTTEN_MS = 120_000.0
"""A session without rounds or results for this long no longer counts as active."""
SMOOTHING = 0.2
LONGEST_GAP_MS = 500.0
"""Longer idle times of a verifier count as this much."""
DEFAULT_RETURN_MS = 5.0
"""Expected time from a result to the next round of a drafter that was not measured yet."""


@dataclass(frozen=True)
class SchedulingRules:
    """Configuration of a dispatcher."""

    policy: str
    """A name in `POLICIES`."""
    limits: BatchLimits
    max_draft: int = 16
    """Most draft tokens of a round that are verified."""
    options: PolicyOptions = field(default_factory=PolicyOptions)
    mix: bool = False
    """A session may continue in another arithmetic if no verifier has its own."""


class Dispatcher:
    """Pools rounds and decides which verifier gets which batch, and when."""

    def __init__(self, scheduler_id: str, rules: SchedulingRules) -> None:
        self.scheduler_id = scheduler_id
        self.rules = rules
        self._policy = POLICIES[rules.policy](rules.options)
        self.fleet = VerifierFleet(
            rules.limits.max_wait_ms,
            migrate=self._policy.plays("migration"),
            mix=rules.mix,
            hold_back=self._policy.plays("memory"),
        )
        self._averages = LoadAverages()
        self._batches = 0
        self._return_ms: dict[str, float] = {}
        self._resulted_ms: dict[str, float] = {}
        self._releases: dict[str, list[str]] = {}
        self._halts: dict[str, list[str]] = {}

    def on_verify(self, verify: Verify, now_ms: float) -> None:
        """Pool a round. A copy of a round that is pending or in flight is ignored.

        The same round from another drafter is no copy: the first drafter is gone, and the second needs the result.
        """
        session_id = verify.session
        if verify.attempt == 0 and self._halts_unasked(verify, now_ms):
            return
        for state in self.fleet.verifiers.values():
            state.returning.pop(session_id, None)
            # A drafter that follows a run sends a round to halt it; otherwise the run is over, or lost.
            state.runs.pop(session_id)
            for flight in state.in_flight:
                if _is_copy(verify, flight.jobs.get(session_id)):
                    return
        if _is_copy(verify, self.fleet.pending_round(session_id)):
            return
        if (resulted := self._resulted_ms.pop(session_id, None)) is not None and verify.attempt == 0:
            self._learn_return(verify.drafter, now_ms - resulted)
        due_ms = None
        if verify.slack_ms is not None and "deadlines" not in self.rules.options.without:
            due_ms = now_ms + verify.slack_ms
        session = self.fleet.sessions.setdefault(session_id, ActiveSession(verify.service_class, verify.tpot_ms))
        session.due_ms, session.length, session.seen_ms = due_ms, verify.base_len, now_ms
        pending = PendingRound(verify, now_ms, due_ms, self.rules.max_draft)
        if verify.round > 0 and verify.attempt == 0:
            session.record_expected(1.0 + sum(pending.survival))
        self.fleet.remove(session_id)
        self.fleet.add(pending, now_ms)
        self._halt_for(session)

    def _learn_return(self, drafter_id: str, measured_ms: float) -> None:
        before_ms = self._return_ms.get(drafter_id, measured_ms)
        self._return_ms[drafter_id] = before_ms + SMOOTHING * (measured_ms - before_ms)

    def return_ms(self, drafter_id: str) -> float:
        """Return the usual time from a result to the drafter's next round."""
        return self._return_ms.get(drafter_id, DEFAULT_RETURN_MS)

    def on_result(self, result: Result, now_ms: float) -> None:
        """Settle a job. After a chunk of prefill its round goes back into the pool."""
        state = self.fleet.verifiers.get(result.verifier)
        if state is None:
            return
        pending = self._take_from_flight(state, result, now_ms)
        self._release_elsewhere(state, result, settled=pending is not None)
        if result.status is Status.FAILED or result.finish is not None:
            if (ended := self.fleet.sessions.get(result.session)) is not None:
                self._averages.on_end(ended)
            self._forget(result.session)
            return
        if result.cached:
            state.cached[result.session] = result.cached
        session = self.fleet.sessions.get(result.session)
        if session is not None:
            session.seen_ms = now_ms
        if result.run:
            self._on_run_report(result, session, now_ms)
        run = self._follow_run(state, result, pending, now_ms)
        if run is not None and not result.run_left:
            self._resulted_ms[result.session] = now_ms
            state.returning[result.session] = now_ms + self.return_ms(run.drafter_id or "")
        if pending is None:
            return
        prompt = max(0, result.new_tokens - result.trimmed_to - 1)
        self._averages.on_result(result, prompt, load.prefill_ms(state.model), now_ms)
        self.fleet.prompt_rate = self._averages.prompt_rate
        if result.status is Status.PREFILLED:
            # The rest may be in a batch already: behind this one, or on a verifier that holds more of the session.
            if not any(result.session in flight.jobs for v in self.fleet.verifiers.values() for flight in v.in_flight):
                self._requeue([pending], now_ms)
            return
        if session is not None:
            tokens = session.advance(result.base_len + len(result.tokens))
            away_ms = session.record_result(now_ms, result.queue_ms + result.verify_ms, tokens)
            self._averages.on_return(away_ms)
            if tokens and session.due_ms is not None and session.tpot_ms is not None:
                from_ms = now_ms if pending.verify.round == 0 else session.due_ms
                session.due_ms = from_ms + session.tpot_ms * tokens
        if not result.run_left:
            self._resulted_ms[result.session] = now_ms
            state.returning[result.session] = now_ms + self.return_ms(pending.verify.drafter)

    def _follow_run(
        self, state: VerifierState, result: Result, pending: PendingRound | None, now_ms: float
    ) -> RunningRun | None:
        """Note whether the result's session is in a run; return the run as it was before this result."""
        before = state.runs.pop(result.session)
        if result.run_left:
            drafter_id = None if before is None else before.drafter_id
            if pending is not None:
                drafter_id = pending.verify.drafter
            length = result.base_len + len(result.tokens)
            pace = session.run_pace if (session := self.fleet.sessions.get(result.session)) else ONE_TOKEN
            state.runs.set(result.session, RunningRun(length, drafter_id, now_ms, pace))
        return before

    def _on_run_report(self, result: Result, session: ActiveSession | None, now_ms: float) -> None:
        """Count tokens that were decoded in a run."""
        if result.status is not Status.COMMITTED:
            return
        self._averages.on_run(result)
        if session is not None:
            tokens = session.advance(result.base_len + len(result.tokens))
            session.record_run(now_ms, tokens, result)
            if session.due_ms is not None and session.tpot_ms is not None:
                session.due_ms += session.tpot_ms * tokens

    @staticmethod
    def _take_from_flight(state: VerifierState, result: Result, now_ms: float) -> PendingRound | None:
        """Remove a result's job from its batch; return its round, or None if the job was not in flight."""
        pending = None
        for flight in state.in_flight:
            if flight.batch_id == result.batch:
                pending = flight.jobs.pop(result.session, None)
        running = state.in_flight[0] if state.in_flight else None
        state.in_flight = [flight for flight in state.in_flight if flight.jobs]
        if not state.in_flight:
            state.idle_since_ms = now_ms
        elif state.in_flight[0] is not running:
            # The prepared batch starts now, not when it was sent.
            state.in_flight[0].sent_ms = now_ms
        return pending

    def _release_elsewhere(self, state: VerifierState, result: Result, *, settled: bool) -> None:
        """Let the other verifiers release a session that this one has worked on."""
        for other in self.fleet.verifiers.values():
            if other is not state and other.cached.pop(result.session, 0) and settled:
                self._releases.setdefault(other.verifier_id, []).append(result.session)

    def on_heartbeat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        """Update a verifier. Its residency replaces what was assumed about its cache.

        A verifier with a new lease drops the batches that were sent under the old one, and ends the runs that began
        under it, so the rounds of these batches are pending again.
        """
        state = self.fleet.verifiers.get(heartbeat.verifier)
        before = 0 if state is None else state.heartbeat.lease
        self.fleet.on_heartbeat(heartbeat, now_ms)
        if state is not None and before not in (0, heartbeat.lease):
            for session_id in tuple(state.runs):
                state.runs.pop(session_id)
            dropped, state.in_flight, state.idle_since_ms = state.in_flight, [], now_ms
            for flight in dropped:
                self._requeue(flight.jobs.values(), now_ms)

    def on_pause(self, paused_ms: float) -> None:
        """Note that this scheduler has not run for so long: nothing that was expected meanwhile is late."""
        for state in self.fleet.verifiers.values():
            state.seen_ms += paused_ms
            for flight in state.in_flight:
                flight.sent_ms += paused_ms

    def on_cost_model(self, model: CostModel, now_ms: float) -> None:
        """Predict a verifier's times by this model from now on."""
        if "estimator" not in self.rules.options.without:
            self.fleet.on_cost_model(model, now_ms)

    def on_cancel(self, session_id: str) -> None:
        """Remove a cancelled session."""
        self._forget(session_id)

    def on_returned(self, verifier_id: str, now_ms: float) -> None:
        """Remove a verifier whose queue is gone: the broker returned a batch for it."""
        if verifier_id in self.fleet.verifiers:
            self._drop(verifier_id, now_ms)

    def dispatch(self, now_ms: float) -> tuple[list[tuple[str, Batch]], float | None]:
        """Return the batches to send now, each with its verifier's id, and when to call again if nothing happens."""
        self._drop_lost(now_ms)
        for session in self.fleet.begin_waiting(now_ms):
            self._halt_for(session)
        sends: list[tuple[str, Batch]] = []
        later: list[float] = []
        for state in self.fleet.verifiers.values():
            while state.usable and len(state.in_flight) < 2 and self.fleet.queues[state.verifier_id]:
                plan, at = self._next(state, now_ms)
                if plan is None or at > now_ms:
                    if at != pacing.NEVER:
                        later.append(at)
                    break
                sends.append((state.verifier_id, self._commit(state, plan, now_ms)))
        return sends, min(later, default=None)

    def releases(self) -> dict[str, list[str]]:
        """Return, by verifier, the sessions whose KV it need not keep because another verifier has worked on them.

        Each is returned once.
        """
        releases, self._releases = self._releases, {}
        return releases

    def halts(self) -> dict[str, list[str]]:
        """Return, by verifier, the sessions whose runs are to end with the step in progress. Each is returned once."""
        halts, self._halts = self._halts, {}
        return halts

    @property
    def active(self) -> bool:
        """True if rounds have arrived here; a standby gets none."""
        return self._batches > 0 or self.fleet.pending_count > 0

    def load(self, now_ms: float) -> Load:
        """Return the load message for drafters and gateways."""
        for session_id, session in list(self.fleet.sessions.items()):
            if now_ms - session.seen_ms > FORGOTTEN_MS and self.fleet.pending_round(session_id) is None:
                self._forget(session_id)
        usable = [v for v in self.fleet.verifiers.values() if v.usable]
        return load.load_message(
            self.fleet,
            self._averages,
            now_ms,
            scheduler_id=self.scheduler_id,
            policy=self._policy.name,
            first_come=self._policy.first_come,
            price=load.price_ms(usable, self._averages) if self._policy.plays("price") else 0.0,
            draft_cap=self.rules.max_draft,
            mix=self.rules.mix,
            runs=self._policy.plays("runs"),
            copies=self._policy.plays("copies"),
        )

    def _next(self, state: VerifierState, now_ms: float) -> tuple[BatchPlan | None, float]:
        """Return a verifier's next batch, if it can be planned yet, and when to send it."""
        queue = self.fleet.queues[state.verifier_id]
        static = self._policy.static
        if state.in_flight:
            at_ms = pacing.NEVER if static else pacing.prepare_at(state, now_ms)
        else:
            at_ms = self._policy.ready_ms(queue, now_ms)
        if at_ms > now_ms:
            return None, at_ms
        start_ms = now_ms + state.remaining_ms(now_ms)
        soonest = state.soonest_due_ms(self.fleet.sessions, start_ms + self.rules.limits.max_batch_ms)
        runs_due = state.runs_due_ms(self.fleet.sessions, start_ms)
        promised_ms = runs.tightest_ms(state)
        situation = Situation(state, self.rules.limits, start_ms, soonest, runs_due, promised_ms)
        plan = self._policy.plan(queue, situation)
        if plan.full or static or state.runs:
            # The steps of runs follow each other without a pause: a round that is not sent misses the next one.
            return plan, now_ms
        if state.in_flight:
            return plan, pacing.NEVER if pacing.coming_back(state, self.return_ms) else now_ms
        return plan, pacing.gather_until(state, now_ms) or now_ms

    def _commit(self, state: VerifierState, plan: BatchPlan, now_ms: float) -> Batch:
        """Turn a plan into a batch that is in flight."""
        self._batches += 1
        tightest_ms = runs.tightest_ms(state)
        batch = Batch(
            batch=f"{self.scheduler_id}-{self._batches}",
            scheduler=self.scheduler_id,
            lease=state.heartbeat.lease,
            jobs=[self._job(state, chosen, now_ms, tightest_ms) for chosen in plan.chosen],
            predicted_ms=plan.predicted_ms,
            policy=self._policy.name,
            waiting=plan.waiting,
            left_out=plan.left_out,
        )
        queue = self.fleet.queues[state.verifier_id]
        for chosen in plan.chosen:
            queue.remove(chosen.session_id)
        idle_ms = 0.0 if state.in_flight or state.runs else min(LONGEST_GAP_MS, now_ms - state.idle_since_ms)
        state.gap_ms += SMOOTHING * (idle_ms - state.gap_ms)
        self._averages.on_batch(batch, now_ms)
        jobs = {chosen.session_id: chosen.pending for chosen in plan.chosen}
        starts_ms = now_ms if state.in_flight else now_ms + state.remaining_ms(now_ms)
        chunks = {chosen.session_id: chosen.prefill_to for chosen in plan.chosen if chosen.prefill_to is not None}
        state.in_flight.append(InFlight(batch.batch, jobs, starts_ms, plan.predicted_ms, chunks))
        if not self._policy.static:
            # The rest of a prompt may be in the batch behind this one.
            self._requeue([jobs[session_id] for session_id in chunks], now_ms)
        state.returning = {s: at for s, at in state.returning.items() if at + pacing.LATE_MS > now_ms}
        return batch

    def _job(self, state: VerifierState, chosen: ChosenRound, now_ms: float, tightest_ms: float) -> Job:
        pending = chosen.pending
        return Job.of(
            pending.verify,
            draft=chosen.draft,
            prefill_to=chosen.prefill_to,
            queue_ms=max(0.0, now_ms - pending.arrived_ms),
            slack_ms=None if pending.due_ms is None else pending.due_ms - now_ms,
            reason=chosen.reason,
            run=self._grant(state, chosen, tightest_ms),
        )

    def _grant(self, state: VerifierState, chosen: ChosenRound, tightest_ms: float) -> RunGrant | None:
        session = self.fleet.sessions.get(chosen.session_id)
        if chosen.prefill_to is not None or session is None or not self._policy.plays("runs"):
            return None
        return runs.granted(session, state, chosen, tightest_ms, copies=self._policy.plays("copies"))

    def _halts_unasked(self, verify: Verify, now_ms: float) -> bool:
        session = self.fleet.sessions.get(verify.session)
        state = None if session is None else self.fleet.verifiers.get(session.verifier_id or "")
        return session is not None and state is not None and runs.halts_unasked(session, state, verify, now_ms)

    def _halt_for(self, session: ActiveSession) -> None:
        """Halt the runs without an SLO of the session's verifier if their steps take longer than it was promised."""
        state = self.fleet.verifiers.get(session.verifier_id or "")
        if state is None or not state.runs or not runs.too_long_for(session, state):
            return
        active = self.fleet.sessions
        unpromised = [s for s in state.runs if s in active and active[s].tpot_ms is None]
        if unpromised:
            self._halts.setdefault(state.verifier_id, []).extend(unpromised)

    def _drop_lost(self, now_ms: float) -> None:
        """Remove silent verifiers, lost batches and lost runs; the batches' rounds are pending again."""
        for verifier_id, state in list(self.fleet.verifiers.items()):
            state.runs.drop_silent(now_ms - runs.LOST_MS)
            if now_ms - state.seen_ms > SILENT_MS:
                self._drop(verifier_id, now_ms)
                continue
            for flight in list(state.in_flight):
                if now_ms - flight.sent_ms > LOST_FACTOR * flight.predicted_ms + LOST_SLACK_MS:
                    state.in_flight.remove(flight)
                    self._requeue(flight.jobs.values(), now_ms)

    def _drop(self, verifier_id: str, now_ms: float) -> None:
        self._requeue(self.fleet.drop(verifier_id, now_ms), now_ms)

    def _requeue(self, rounds: Iterable[PendingRound], now_ms: float) -> None:
        """Pool rounds again, but those of sessions that have ended meanwhile or have another round pending."""
        for pending in rounds:
            if pending.session_id in self.fleet.sessions and self.fleet.pending_round(pending.session_id) is None:
                self.fleet.add(pending, now_ms)

    def _forget(self, session_id: str) -> None:
        self.fleet.forget(session_id)
        self._resulted_ms.pop(session_id, None)


def _is_copy(verify: Verify, pending: PendingRound | None) -> bool:
    return pending is not None and pending.verify.drafter == verify.drafter and pending.verify.round >= verify.round
