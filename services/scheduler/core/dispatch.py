"""The scheduler's decisions as one synchronous object: events in, batches out, no clock and no I/O of its own.

The live service and the simulator drive the same class. Every time is `now_ms` on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.core import load, pacing
from services.scheduler.core.batching import Chosen, Limits, Plan
from services.scheduler.core.fleet import Fleet
from services.scheduler.core.load import Recent
from services.scheduler.core.policies import Part, PolicyName, Situation, policy_of
from services.scheduler.core.pool import InFlight, Known, Pending, VerifierState
from shared.messages import SILENT_MS, Batch, CostModel, Heartbeat, Job, Load, Result, Status, Verify

LOST_FACTOR = 5.0
LOST_SLACK_MS = 5000.0
"""A batch without results after five times its predicted time and this much more is lost."""
FORGOTTEN_MS = 120_000.0
"""A session without news for this long is not under way any more, whatever became of it."""
SMOOTHING = 0.2
LONGEST_GAP_MS = 500.0
DEFAULT_RETURN_MS = 5.0


@dataclass(frozen=True)
class Rules:
    """How a scheduler decides."""

    policy: PolicyName
    limits: Limits
    max_draft: int = 16
    sled_batch: int = 8
    sled_fill_ms: float = 50.0
    without: frozenset[Part] = field(default_factory=frozenset)
    """Parts to leave out, to see what each brings."""

    def plays(self, part: Part) -> bool:
        """Whether a part of `wisp+` is there."""
        return self.policy == "wisp+" and part not in self.without


class Dispatcher:
    """Pools rounds and decides which verifier gets which batch, and when."""

    def __init__(self, name: str, rules: Rules) -> None:
        self.name = name
        self.rules = rules
        self.fleet = Fleet(rules.limits.max_wait_ms, migrate=rules.plays("migration"))
        self._policy = policy_of(rules.policy, rules.sled_batch, rules.without)
        self._recent = Recent()
        self._batches = 0
        self._return_ms: dict[str, float] = {}
        self._resulted_ms: dict[str, float] = {}
        self._releases: dict[str, list[str]] = {}

    def on_verify(self, verify: Verify, now_ms: float) -> None:
        """A round arrived. A copy of one that waits or is in flight already changes nothing.

        The same round from another drafter is no copy: the first one is gone, and the result has to reach the second.
        """
        session = verify.session
        for state in self.fleet.verifiers.values():
            state.returning.pop(session, None)
            for flight in state.in_flight:
                if _is_copy(verify, flight.jobs.get(session)):
                    return
        if _is_copy(verify, self.fleet.waits(session)):
            return
        if (resulted := self._resulted_ms.pop(session, None)) is not None and verify.attempt == 0:
            self._learn_return(verify.drafter, now_ms - resulted)
        due = None
        if verify.slack_ms is not None and "deadlines" not in self.rules.without:
            due = now_ms + verify.slack_ms
        known = self.fleet.known.setdefault(session, Known(verify.service_class, verify.tpot_ms))
        known.due_ms, known.seen_ms = due, now_ms
        self.fleet.remove(session)
        self.fleet.add(Pending(verify, now_ms, due, self.rules.max_draft), now_ms)

    def _learn_return(self, drafter: str, measured_ms: float) -> None:
        known = self._return_ms.get(drafter, measured_ms)
        self._return_ms[drafter] = known + SMOOTHING * (measured_ms - known)

    def return_ms(self, drafter: str) -> float:
        """How long after a result this drafter's next round usually arrives."""
        return self._return_ms.get(drafter, DEFAULT_RETURN_MS)

    def on_result(self, result: Result, now_ms: float) -> None:
        """A job is done; a chunk of prefill puts its round back into the pool."""
        state = self.fleet.verifiers.get(result.verifier)
        if state is None:
            return
        job = None
        for flight in state.in_flight:
            if flight.batch.batch == result.batch:
                job = flight.jobs.pop(result.session, None)
        running = state.in_flight[0] if state.in_flight else None
        state.in_flight = [flight for flight in state.in_flight if flight.jobs]
        if not state.in_flight:
            state.idle_since_ms = now_ms
        elif state.in_flight[0] is not running:
            # The prepared batch starts now, not when it was sent.
            state.in_flight[0].sent_ms = now_ms
        for other in self.fleet.verifiers.values():
            if other is not state and other.cached.pop(result.session, 0) and job is not None:
                self._releases.setdefault(other.name, []).append(result.session)
        if result.status is Status.FAILED or result.finish is not None:
            if (ended := self.fleet.known.get(result.session)) is not None:
                self._recent.ended(ended)
            self._forget(result.session)
            return
        if result.cached:
            state.cached[result.session] = result.cached
        if job is None:
            return
        known = self.fleet.known.get(result.session)
        if known is not None:
            known.seen_ms = now_ms
        prompt = max(0, result.new_tokens - result.trimmed_to - 1)
        self._recent.resulted(result, prompt, load.prefill_ms(state.model), now_ms)
        if result.status is Status.PREFILLED:
            if self.fleet.waits(result.session) is None:
                self.fleet.add(job, now_ms)
            return
        if known is not None:
            self._recent.away(known.resulted(now_ms, result.queue_ms + result.verify_ms, len(result.tokens)))
        if known is not None and known.due_ms is not None and known.tpot_ms is not None:
            from_ms = now_ms if job.verify.round == 0 else known.due_ms
            known.due_ms = from_ms + known.tpot_ms * len(result.tokens)
        self._resulted_ms[result.session] = now_ms
        state.returning[result.session] = now_ms + self.return_ms(job.verify.drafter)

    def on_heartbeat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        """A verifier is there; what it says that it holds replaces what was believed."""
        self.fleet.on_heartbeat(heartbeat, now_ms)

    def on_cost_model(self, model: CostModel, now_ms: float) -> None:
        """A verifier's times are predicted by this from now on."""
        if "estimator" not in self.rules.without:
            self.fleet.on_cost_model(model, now_ms)

    def on_cancel(self, session: str) -> None:
        """Nobody waits for this session."""
        self._forget(session)

    def on_returned(self, verifier: str, now_ms: float) -> None:
        """No queue took a batch for this verifier: it is gone."""
        if verifier in self.fleet.verifiers:
            self._drop(verifier, now_ms)

    def dispatch(self, now_ms: float) -> tuple[list[tuple[str, Batch]], float | None]:
        """The batches to send now, each with its verifier's name; and when to ask again if nothing happens before."""
        self._drop_lost(now_ms)
        sends: list[tuple[str, Batch]] = []
        later: list[float] = []
        for state in self.fleet.verifiers.values():
            while state.usable and len(state.in_flight) < 2 and self.fleet.queues[state.name]:
                plan, at = self._next(state, now_ms)
                if plan is None or at > now_ms:
                    if at != pacing.NEVER:
                        later.append(at)
                    break
                sends.append((state.name, self._commit(state, plan, now_ms)))
        return sends, min(later, default=None)

    def releases(self) -> dict[str, list[str]]:
        """Sessions whose K/V a verifier need not keep, since another has worked on them; each is told once."""
        told, self._releases = self._releases, {}
        return told

    @property
    def active(self) -> bool:
        """Whether rounds have come here; a standby gets none."""
        return self._batches > 0 or self.fleet.waiting > 0

    def load(self, now_ms: float) -> Load:
        """What drafters and gateways are told."""
        for session, known in list(self.fleet.known.items()):
            if now_ms - known.seen_ms > FORGOTTEN_MS and self.fleet.waits(session) is None:
                self._forget(session)
        usable = [v for v in self.fleet.verifiers.values() if v.usable]
        return load.load(
            self.name,
            self.rules.policy,
            load.price_ms(usable, self._recent) if self.rules.plays("price") else 0.0,
            self.rules.max_draft,
            self.fleet,
            self._recent,
            now_ms,
        )

    def _next(self, state: VerifierState, now_ms: float) -> tuple[Plan | None, float]:
        """The batch that a verifier would get, if it is known yet, and when."""
        queue = self.fleet.queues[state.name]
        static = self.rules.policy == "sled"
        if state.in_flight:
            at_ms = pacing.NEVER if static else pacing.prepare_at(state, now_ms)
        else:
            at_ms = pacing.filled_at(queue, self.rules.sled_batch, self.rules.sled_fill_ms) if static else now_ms
        if at_ms > now_ms:
            return None, at_ms
        start_ms = now_ms + state.remaining_ms(now_ms)
        soonest = state.soonest_due_ms(self.fleet.known, start_ms + self.rules.limits.max_batch_ms)
        plan = self._policy.plan(queue, Situation(state, self.rules.limits, start_ms, soonest))
        if plan.full or static:
            return plan, now_ms
        if state.in_flight:
            return plan, pacing.NEVER if pacing.coming_back(state, self.return_ms) else now_ms
        return plan, pacing.gather_until(state, now_ms) or now_ms

    def _commit(self, state: VerifierState, plan: Plan, now_ms: float) -> Batch:
        self._batches += 1
        batch = Batch(
            batch=f"{self.name}-{self._batches}",
            scheduler=self.name,
            lease=state.heartbeat.lease,
            jobs=[_job(chosen, now_ms) for chosen in plan.chosen],
            predicted_ms=plan.predicted_ms,
            policy=self.rules.policy,
            waiting=plan.waiting,
            left_out=plan.left_out,
        )
        queue = self.fleet.queues[state.name]
        for chosen in plan.chosen:
            queue.remove(chosen.waiting.session)
        idle_ms = 0.0 if state.in_flight else min(LONGEST_GAP_MS, now_ms - state.idle_since_ms)
        state.gap_ms += SMOOTHING * (idle_ms - state.gap_ms)
        self._recent.sent(batch)
        jobs = {chosen.waiting.session: chosen.pending for chosen in plan.chosen}
        state.in_flight.append(InFlight(batch, jobs, now_ms, plan.predicted_ms))
        state.returning = {s: at for s, at in state.returning.items() if at + pacing.LATE_MS > now_ms}
        return batch

    def _drop_lost(self, now_ms: float) -> None:
        for name, state in list(self.fleet.verifiers.items()):
            if now_ms - state.seen_ms > SILENT_MS:
                self._drop(name, now_ms)
                continue
            for flight in list(state.in_flight):
                if now_ms - flight.sent_ms > LOST_FACTOR * flight.predicted_ms + LOST_SLACK_MS:
                    state.in_flight.remove(flight)
                    self._requeue(flight.jobs.values(), now_ms)

    def _drop(self, name: str, now_ms: float) -> None:
        self._requeue(self.fleet.drop(name, now_ms), now_ms)

    def _requeue(self, jobs: Iterable[Pending], now_ms: float) -> None:
        for pending in jobs:
            if self.fleet.waits(pending.session) is None:
                self.fleet.add(pending, now_ms)

    def _forget(self, session: str) -> None:
        self.fleet.forget(session)
        self._resulted_ms.pop(session, None)


def _is_copy(verify: Verify, known: Pending | None) -> bool:
    return known is not None and known.verify.drafter == verify.drafter and known.verify.round >= verify.round


def _job(chosen: Chosen, now_ms: float) -> Job:
    pending = chosen.pending
    return Job.of(
        pending.verify,
        draft=chosen.draft,
        prefill_to=chosen.prefill_to,
        queue_ms=max(0.0, now_ms - pending.arrived_ms),
        slack_ms=None if pending.due_ms is None else pending.due_ms - now_ms,
        reason=chosen.reason,
    )
