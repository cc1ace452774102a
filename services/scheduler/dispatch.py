"""The scheduler's decisions as one synchronous object: events in, batches out, no clock and no I/O of its own.

The live service and the simulator drive the same class. Every time is `now_ms` on the caller's clock.
"""

from __future__ import annotations

from services.scheduler import pacing, placement
from services.scheduler.batching import Chosen, Limits, Plan, fill
from services.scheduler.policies import POLICIES
from services.scheduler.pool import InFlight, Pending, VerifierState
from shared.messages import Batch, CostModel, Heartbeat, Job, Load, Result, Status, Verify

SILENT_MS = 2000.0
"""A verifier not heard of for this long is gone; four times the usual time between heartbeats."""
LOST_FACTOR = 5.0
LOST_SLACK_MS = 5000.0
"""A batch without results after five times its predicted time and this much more is lost."""
SMOOTHING = 0.2
DEFAULT_RETURN_MS = 5.0


class Dispatcher:
    """Pools rounds and decides which verifier gets which batch, and when."""

    def __init__(self, name: str, policy: str, limits: Limits, max_draft: int) -> None:
        self.name = name
        self.policy = policy
        self.pool: dict[str, Pending] = {}
        self.verifiers: dict[str, VerifierState] = {}
        self._order = POLICIES[policy]
        self._limits = limits
        self._max_draft = max_draft
        self._models: dict[str, CostModel] = {}
        self._batches = 0
        self._queue_ms = 0.0
        self._return_ms: dict[str, float] = {}
        self._resulted_ms: dict[str, float] = {}

    def on_verify(self, verify: Verify, now_ms: float) -> None:
        """A round arrived. A copy of one that waits or is in flight already changes nothing.

        The same round from another drafter is no copy: the first one is gone, and the result has to reach the second.
        """
        session = verify.session
        for state in self.verifiers.values():
            state.returning.pop(session, None)
            for flight in state.in_flight:
                if _is_copy(verify, flight.jobs.get(session)):
                    return
        if _is_copy(verify, self.pool.get(session)):
            return
        if (resulted := self._resulted_ms.pop(session, None)) is not None and verify.attempt == 0:
            self._learn_return(verify.drafter, now_ms - resulted)
        due = None if verify.slack_ms is None else now_ms + verify.slack_ms
        self.pool[session] = Pending(verify, now_ms, due)

    def _learn_return(self, drafter: str, measured_ms: float) -> None:
        known = self._return_ms.get(drafter, measured_ms)
        self._return_ms[drafter] = known + SMOOTHING * (measured_ms - known)

    def return_ms(self, drafter: str) -> float:
        """How long after a result this drafter's next round usually arrives."""
        return self._return_ms.get(drafter, DEFAULT_RETURN_MS)

    def on_result(self, result: Result, now_ms: float) -> None:
        """A job is done; a chunk of prefill puts its round back into the pool."""
        state = self.verifiers.get(result.verifier)
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
        if result.status is Status.FAILED or result.finish is not None:
            self._forget(result.session)
            return
        for other in self.verifiers.values():
            if other is not state:
                other.cached.pop(result.session, None)
        if result.cached:
            state.cached[result.session] = result.cached
        if job is None:
            return
        if result.status is Status.PREFILLED:
            self.pool.setdefault(result.session, job)
        else:
            self._resulted_ms[result.session] = now_ms
            state.returning[result.session] = now_ms + self.return_ms(job.verify.drafter)

    def on_heartbeat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        """A verifier is there; what it says that it holds replaces what was believed."""
        state = self.verifiers.get(heartbeat.verifier)
        if state is None:
            state = VerifierState(heartbeat, now_ms, idle_since_ms=now_ms)
            if (model := self._models.get(heartbeat.verifier)) is not None:
                state.model = model
            self.verifiers[heartbeat.verifier] = state
        state.heartbeat, state.seen_ms = heartbeat, now_ms
        state.cached = {held.session: held.cached for held in heartbeat.residency}

    def on_cost_model(self, model: CostModel) -> None:
        """A verifier's times are predicted by this from now on."""
        self._models[model.verifier] = model
        if (state := self.verifiers.get(model.verifier)) is not None:
            state.model = model

    def on_cancel(self, session: str) -> None:
        """Nobody waits for this session."""
        self._forget(session)

    def on_returned(self, verifier: str) -> None:
        """No queue took a batch for this verifier: it is gone."""
        if verifier in self.verifiers:
            self._drop(verifier)

    def dispatch(self, now_ms: float) -> tuple[list[tuple[str, Batch]], float | None]:
        """The batches to send now, each with its verifier's name; and when to ask again if nothing happens before."""
        self._drop_lost(now_ms)
        sends: list[tuple[str, Batch]] = []
        while True:
            later: list[float] = []
            sent = len(sends)
            for state, plan in self._plans(now_ms):
                at = self._send_at(state, plan, now_ms)
                if at is not None and at <= now_ms:
                    sends.append((state.name, self._commit(state, plan, now_ms)))
                elif at is not None:
                    later.append(at)
            if len(sends) == sent:
                return sends, min(later, default=None)

    @property
    def active(self) -> bool:
        """Whether rounds have come here; a standby gets none."""
        return self._batches > 0 or bool(self.pool)

    def load(self) -> Load:
        """What drafters and gateways are told."""
        return Load(
            scheduler=self.name,
            price_ms=0.0,
            queue_ms=self._queue_ms,
            pending=len(self.pool),
            draft_cap=self._max_draft,
        )

    def _plans(self, now_ms: float) -> list[tuple[VerifierState, Plan]]:
        """For every usable verifier that may take a batch, the batch it would get now."""
        states = [s for s in self.verifiers.values() if s.usable]
        groups: dict[str, list[Pending]] = {s.name: [] for s in states}
        placed: dict[str, int] = {}
        for pending in sorted(self.pool.values(), key=lambda p: (p.arrived_ms, p.session)):
            state = placement.home(pending.session, states) or placement.place(pending, states, placed)
            if state is not None:
                groups[state.name].append(pending)
                placed[state.name] = placed.get(state.name, 0) + 1
        return [
            (s, fill(self._order(groups[s.name], now_ms), s, self._limits))
            for s in states
            if len(s.in_flight) < 2 and groups[s.name]
        ]

    def _send_at(self, state: VerifierState, plan: Plan, now_ms: float) -> float | None:
        if state.in_flight:
            return pacing.prepare_at(state, plan, self.return_ms, now_ms)
        if plan.full:
            return now_ms
        return pacing.gather_until(state, now_ms) or now_ms

    def _commit(self, state: VerifierState, plan: Plan, now_ms: float) -> Batch:
        self._batches += 1
        batch = Batch(
            batch=f"{self.name}-{self._batches}",
            scheduler=self.name,
            jobs=[_job(chosen, now_ms) for chosen in plan.chosen],
            predicted_ms=plan.predicted_ms,
            policy=self.policy,
        )
        jobs = {chosen.pending.session: self.pool.pop(chosen.pending.session) for chosen in plan.chosen}
        for job in jobs.values():
            self._queue_ms += SMOOTHING * (now_ms - job.arrived_ms - self._queue_ms)
        state.in_flight.append(InFlight(batch, jobs, now_ms, plan.predicted_ms))
        state.returning = {s: at for s, at in state.returning.items() if at + pacing.LATE_MS > now_ms}
        return batch

    def _drop_lost(self, now_ms: float) -> None:
        for name, state in list(self.verifiers.items()):
            if now_ms - state.seen_ms > SILENT_MS:
                self._drop(name)
                continue
            for flight in list(state.in_flight):
                if now_ms - flight.sent_ms > LOST_FACTOR * flight.predicted_ms + LOST_SLACK_MS:
                    state.in_flight.remove(flight)
                    self._requeue(flight)

    def _drop(self, name: str) -> None:
        for flight in self.verifiers.pop(name).in_flight:
            self._requeue(flight)

    def _requeue(self, flight: InFlight) -> None:
        for session, job in flight.jobs.items():
            self.pool.setdefault(session, job)

    def _forget(self, session: str) -> None:
        self.pool.pop(session, None)
        self._resulted_ms.pop(session, None)
        for state in self.verifiers.values():
            state.cached.pop(session, None)
            state.returning.pop(session, None)


def _is_copy(verify: Verify, known: Pending | None) -> bool:
    return known is not None and known.verify.drafter == verify.drafter and known.verify.round >= verify.round


def _job(chosen: Chosen, now_ms: float) -> Job:
    verify = chosen.pending.verify
    return Job(
        session=verify.session,
        round=verify.round,
        base_len=verify.base_len,
        draft=[] if chosen.prefill_to is not None else verify.draft,
        drafted=len(verify.draft),
        prefill_to=chosen.prefill_to,
        drafter=verify.drafter,
        gateway=verify.gateway,
        fingerprint=verify.fingerprint,
        draft_ms=verify.draft_ms,
        queue_ms=max(0.0, now_ms - chosen.pending.arrived_ms),
        service_class=verify.service_class,
        slack_ms=None if chosen.pending.due_ms is None else chosen.pending.due_ms - now_ms,
        reason=chosen.reason,
        hidden_from=verify.hidden_from if chosen.prefill_to is None else None,
        hidden_format=verify.hidden_format,
    )
