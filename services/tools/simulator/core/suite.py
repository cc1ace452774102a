"""The suite in virtual time: the scheduler's dispatcher, and verifiers and drafters around it.

The dispatcher, the drafter's controller and session, and the verifier's acceptance are the live code. The simulation
replaces the rest of a service by waits: for a step of the target, for a draft on the device, for a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import simpy

from services.drafter.control import Calibration, Controller, DraftDecision, DraftRound, RoundTimes
from services.drafter.core.session import DraftSession, verified_counts
from services.drafter.core.synthetic import SOURCE
from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import POLICIES, PolicyOptions
from services.tools.bench.scaling.core.autoscaling import SCRAPE_S, Autoscaler, SchedulerMetrics
from services.tools.simulator.core.drafts import DraftModel
from services.tools.simulator.core.scenario import Autoscaling, Scenario
from services.tools.simulator.core.verifier import SimulatedSession, SimulatedVerifier
from services.tools.simulator.core.world import (
    RIGHT,
    WRONG,
    ClientRequest,
    Process,
    SimulatedHardware,
    World,
)
from shared.messages import Heartbeat, Job, Load, Result, Status

LOAD_MS = 500.0
MOST_BATCH_TOKENS = 2048
MOST_EXPERIENCES = 4096
"""Most devices whose calibration is cached for the next points."""


@dataclass
class _SimulatedDraft:
    """A draft, and whether each token is the target's own choice. If a token was dropped, its outcome is the last."""

    round: DraftRound
    right: list[bool] = field(default_factory=list)
    ms: float = 0.0

    def probe_outcome(self) -> bool | None:
        """Return whether the only token of a probe, which is not sent, is right."""
        return self.right[0] if self.right else None


class SuiteWorld(World):
    """The suite under a batch policy."""

    def __init__(
        self, scenario: Scenario, hardware: SimulatedHardware, seed: int, *, policy: str, without: Sequence[str] = ()
    ) -> None:
        super().__init__(scenario, hardware, seed)
        fixed = POLICIES[policy].fixed_draft
        self._rule, self._longest = ("marginal", scenario.draft_length) if fixed is None else ("fixed", fixed)
        limits = BatchLimits(scenario.max_batch_ms, MOST_BATCH_TOKENS)
        options = PolicyOptions(without=frozenset(without))  # type: ignore[arg-type]
        self._dispatcher = Dispatcher("scheduler", SchedulingRules(policy, limits, self._longest, options))
        self._controllers: dict[int, Controller] = {}
        """By client: each device has a drafter of its own."""
        self._load: Load | None = None
        self._sessions: dict[str, SimulatedSession] = {}
        self._woken_ms: float | None = None
        self._verifiers: dict[str, SimulatedVerifier] = {}
        self._met = self._missed = 0
        """Rounds by deadline, as the scheduler counts them."""
        for _ in range(scenario.verifiers):
            self._start_verifier()
        self.env.process(self._publish_load())
        if scenario.autoscaling is not None:
            self.env.process(self._autoscale(scenario.autoscaling))

    def _start_verifier(self) -> None:
        number = len(self._verifiers)
        speed = self.scenario.speed_of(number)
        verifier = SimulatedVerifier(self, f"verifier-{number + 1}", speed)
        self._verifiers[verifier.verifier_id] = verifier
        model = self.target.cost_model(verifier.verifier_id)
        slower = model.model_copy(update={"coefficients": [ms / speed for ms in model.coefficients]})
        self._dispatcher.on_cost_model(slower, self.now_ms)
        self.env.process(verifier.beat())
        self.env.process(verifier.work())

    def _autoscale(self, scaling: Autoscaling) -> Process:
        """Start and stop verifiers as Kubernetes would."""
        scaler = Autoscaler(self.scenario.verifiers, scaling.most)
        while True:
            yield self.env.timeout(1000 * SCRAPE_S)
            load = self._load
            scaler.sample(
                SchedulerMetrics(
                    queue_delay_s=0.0 if load is None else load.backlog_ms / 1000,
                    demand=0.0 if load is None else load.demand,
                    met=self._met,
                    missed=self._missed,
                )
            )
            change, metric = scaler.change(self.now_ms / 1000)
            for _ in range(change):
                self.at(self.now_ms + 1000 * scaling.start_s, self._start_verifier)
            serving = [one for one in self._verifiers.values() if not one.draining]
            for verifier in serving[len(serving) + min(0, change) :]:
                verifier.draining = True
            if change:
                self.scalings.append((self.now_ms / 1000, scaler.current, metric))

    def serve(self, served: ClientRequest) -> None:
        # Over the downlink to the device's drafter, which sends the first round.
        arrival_ms = served.device.downlink.arrival_ms(self.now_ms + self.scenario.hop_ms)
        self.at(arrival_ms, lambda: self._open_session(served))

    def give_up(self, served: ClientRequest) -> None:
        session_id = served.generate.session
        self._sessions.pop(session_id, None)
        self._dispatcher.on_cancel(session_id)
        for verifier in self._verifiers.values():
            verifier.forget(session_id)
        self._decide()

    def settle_stale(self, job: Job, batch_id: str, verifier_id: str) -> None:
        """Tell the scheduler that a job's session has ended or has these tokens already."""
        session = self._sessions.get(job.session)
        known = 0 if session is None else max(0, session.length - job.base_len)
        result = Result(
            session=job.session, round=job.round, base_len=job.base_len, verifier=verifier_id, batch=batch_id,
            status=Status.FAILED if session is None else Status.COMMITTED, tokens=[RIGHT] * known,
        )  # fmt: skip

        def schedule() -> None:
            self._dispatcher.on_result(result, self.now_ms)
            self._decide()

        self.at(self.now_ms + self.scenario.hop_ms, schedule)

    def _open_session(self, served: ClientRequest) -> None:
        if served.gone:
            return
        client = served.request.session
        if client not in self._controllers:
            self._controllers[client] = experienced_controller(
                self._rule, self._longest, self.drafts, self.scenario, f"{self._seed}/{client}"
            )
            if self._load is not None:
                self._controllers[client].times.apply_load(self._load)
        slo = served.generate.slo
        session = SimulatedSession(
            served,
            DraftSession(served.generate, list(served.generate.prompt)),
            self._controllers[client].session(SOURCE, tpot_ms=None if slo is None else slo.tpot_ms),
            self.drafts.of_request(served.request.seed),
            simpy.Store(self.env),
            len(served.generate.prompt),
        )
        self._sessions[served.generate.session] = session
        self.env.process(self._draft_and_verify(session))

    def _draft_and_verify(self, session: SimulatedSession) -> Process:
        """Draft round by round until the session ends, as `services.drafter.serving` does, but halt no run."""
        state, control, served = session.state, session.control, session.served
        while not state.done:
            made, probes, run_tokens = self._draft(session)
            if made.ms:
                yield self.env.timeout(made.ms)
            if served.gone:
                return
            sent_ms, sent_round = self.now_ms, state.round
            elapsed_ms = self.now_ms - served.start_ms + control.times.one_way_ms
            kept = [RIGHT if right else WRONG for right in made.right[: made.round.kept]]
            verify = state.verify(
                kept, made.round.acceptance, f"drafter-{served.request.session}", elapsed_ms, made.ms,
                run_tokens=run_tokens,
            )  # fmt: skip
            arrival_ms = served.device.uplink.arrival_ms(self.now_ms) + self.scenario.hop_ms
            self.at(arrival_ms, lambda verify=verify: self._on_verify(verify))  # type: ignore[misc]
            start = session.position
            while True:
                result: Result = yield session.inbox.get()
                if state.apply(result):
                    break
            if state.first_ms is None and state.output_tokens:
                state.first_ms = self.now_ms - served.start_ms
            self._learn(session, made, result, self.now_ms - sent_ms)
            for probe in probes:
                control.settle(probe.round, 0, 0, probe.probe_outcome())
            verified, accepted = verified_counts(result)
            served.rounds.append(
                {
                    "round": sent_round, "start": start, "drafted": result.drafted, "verified": verified,
                    "accepted": accepted, "tokens": len(result.tokens), "draft_ms": made.ms,
                    "queue_ms": result.queue_ms, "verify_ms": result.verify_ms, "run": False,
                }
            )  # fmt: skip
            while state.run_left and not state.done:
                known = len(state.tokens)
                result = yield session.inbox.get()
                state.apply(result)
                control.learn_run(len(state.tokens) - known, result.verify_ms)
        control.close()

    def _draft(self, session: SimulatedSession) -> tuple[_SimulatedDraft, list[_SimulatedDraft], int]:
        """Return the next round's draft, its probes, and the tokens that the session leaves to the verifier."""
        control, served = session.control, session.served
        room = session.state.draft_room(self._longest)
        # The first round goes out while the draft model still computes the prompt.
        unready = {SOURCE} if session.state.round == 0 else set()
        round_ = control.begin(room, self.scenario.temperature, unready=unready)
        probes = [self._tokens(session, probe) for probe in round_.deferred_probes()]
        made = self._tokens(session, round_)
        if made.right:
            made.ms = served.device.hardware.steps_ms(len(made.right))
            control.times.learn_draft(SOURCE, len(made.right), made.ms)
        if round_.kept and not round_.pays:
            round_.cut(0)
        return made, probes, control.run_tokens(round_)

    @staticmethod
    def _tokens(session: SimulatedSession, round_: DraftRound) -> _SimulatedDraft:
        made = _SimulatedDraft(round_)
        # After the first token `add` decides: there is one source.
        goes_on, position = round_.longest > 0 and round_.wants(SOURCE), session.position
        while goes_on:
            drafted = session.drafts.token(position, len(made.right))
            made.right.append(drafted.right)
            goes_on = round_.add(drafted.token) is DraftDecision.MORE
        return made

    @staticmethod
    def _learn(session: SimulatedSession, made: _SimulatedDraft, result: Result, round_ms: float) -> None:
        control = session.control
        if result.round > 0:
            control.times.learn_round(result.trimmed_to, round_ms, result.verify_ms, result.queue_ms, result.new_tokens)
        verified, accepted = verified_counts(result)
        known = accepted == verified and len(result.tokens) > accepted and len(made.right) > verified
        control.settle(made.round, verified, accepted, made.right[verified] if known else None)

    def _on_verify(self, verify: object) -> None:
        self._dispatcher.on_verify(verify, self.now_ms)  # type: ignore[arg-type]
        self._decide()

    def _decide(self) -> None:
        """Send the batches that are due, and decide again when the dispatcher asks for it."""
        sends, later_ms = self._dispatcher.dispatch(self.now_ms)
        hop_ms = self.scenario.hop_ms
        for verifier_id, batch in sends:
            verifier = self._verifiers[verifier_id]
            self.at(self.now_ms + hop_ms, lambda v=verifier, b=batch: v.put(b))  # type: ignore[misc]
        for verifier_id, session_ids in self._dispatcher.releases().items():
            for session_id in session_ids:
                self._verifiers[verifier_id].release(session_id)
        for verifier_id, session_ids in self._dispatcher.halts().items():
            self._verifiers[verifier_id].halt(session_ids)
        if later_ms is not None and (self._woken_ms is None or later_ms < self._woken_ms):
            self._woken_ms = later_ms
            self.at(later_ms, self._wake)

    def _wake(self) -> None:
        self._woken_ms = None
        self._decide()

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Hand a verifier's heartbeat to the scheduler."""
        self._dispatcher.on_heartbeat(heartbeat, self.now_ms)
        self._decide()

    def session(self, session_id: str) -> SimulatedSession | None:
        """Return an open session; None if it has ended."""
        return self._sessions.get(session_id)

    def publish(self, session: SimulatedSession, result: Result) -> None:
        """Send a result to the scheduler, to the session's drafter and to its client."""
        hop_ms = self.scenario.hop_ms

        def schedule() -> None:
            self._count_deadline(result)
            self._dispatcher.on_result(result, self.now_ms)
            self._decide()

        self.at(self.now_ms + hop_ms, schedule)
        if result.status is not Status.PREFILLED:
            arrival_ms = session.served.device.downlink.arrival_ms(self.now_ms + hop_ms)
            self.at(arrival_ms, lambda: session.take(result))
            self.deliver(session.served, result)
        if result.finish is not None:
            del self._sessions[result.session]

    def _count_deadline(self, result: Result) -> None:
        """Count a round as met or missed, as the scheduler's service does for its metrics."""
        session = self._dispatcher.fleet.sessions.get(result.session)
        if session is None or session.due_ms is None or result.run or result.status is not Status.COMMITTED:
            return
        self._met += self.now_ms <= session.due_ms
        self._missed += self.now_ms > session.due_ms

    def _publish_load(self) -> Process:
        while True:
            yield self.env.timeout(LOAD_MS)
            self._load = self._dispatcher.load(self.now_ms)
            for controller in self._controllers.values():
                controller.times.apply_load(self._load)


def experienced_controller(rule: str, longest: int, model: DraftModel, scenario: Scenario, seed: str) -> Controller:
    """Return a device's controller, which has learned from earlier rounds how often its drafts are right."""
    controller = Controller(rule, longest, model.weights, RoundTimes())
    learned = _experience(rule, longest, model, scenario.temperature, scenario.experience_rounds, seed)
    controller.calibration = learned.copy()
    return controller


@lru_cache(maxsize=MOST_EXPERIENCES)
def _experience(rule: str, longest: int, model: DraftModel, temperature: float, rounds: int, seed: str) -> Calibration:
    """Return the calibration of a drafter after earlier rounds: the same at each point of a campaign."""
    controller = Controller(rule, longest, model.weights, RoundTimes())
    for number in range(rounds):
        drafts = model.of_request(Random(f"{seed}/earlier/{number}").getrandbits(48))
        control = controller.session(SOURCE)
        round_ = control.ahead(longest, temperature)
        right = []
        for ahead in range(longest):
            drafted = drafts.token(0, ahead)
            right.append(drafted.right)
            if round_.add(drafted.token) is not DraftDecision.MORE:
                break
        kept = right[: round_.kept]
        accepted = next((i for i, correct in enumerate(kept) if not correct), len(kept))
        known = accepted == len(kept) < len(right)
        control.settle(round_, len(kept), accepted, right[accepted] if known else None)
    return controller.calibration
