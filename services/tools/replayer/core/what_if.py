"""Recorded arrivals under another batch policy or stop rule, in virtual time. Pure.

The scheduler's dispatcher, the drafter's session and stop rule and the verifier's acceptance are those that run live.
Verifiers take the time that their last recorded cost model predicts, times what all their batches took by it; drafters
take the time that was recorded. Requests come
when they came: clients that would have asked sooner, or been refused, are not imagined.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

from services.drafter.control.rules import Marginal, Standing
from services.drafter.control.times import Pace
from services.drafter.core.session import DraftSession
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.tools.replayer.core.performance import Figures, Served, figures
from services.tools.replayer.core.traffic import Arrivals, Draft, Visit
from services.verifier.core.acceptance import accept
from shared import cost
from shared.messages import SILENT_MS, Batch, CostModel, Finish, Heartbeat, Job, Result, Status, Verify

HEARTBEAT_MS = 500.0
LOAD_MS = 500.0
LONGEST_FACTOR = 20.0
"""A virtual run that takes so many times as long as the recording does not keep up, and is ended."""
SHORTEST_MS = 60_000.0

StopRule = Literal["recorded", "marginal"]
"""`recorded`: drafts as long as they were. `marginal`: the drafter's rule decides anew how much of each recorded draft
to send. No rule can draft what was not drafted then."""


@dataclass(frozen=True)
class Drafting:
    """How much of each recorded draft is sent."""

    rule: StopRule = "recorded"
    longest: int | None = None
    """At most so many tokens; 0 is plain decoding."""


class _Verifier:
    """A verifier in virtual time: its cache, and when it is free."""

    def __init__(self, heartbeat: Heartbeat, until_ms: float, model: CostModel) -> None:
        self.heartbeat = heartbeat
        self.until_ms = until_ms
        """When it was gone."""
        self.model = model
        self.free_ms = 0.0
        self.cached: OrderedDict[str, int] = OrderedDict()

    def holds(self, session: str) -> int:
        return self.cached.get(session, 0)

    def keep(self, session: str, tokens: int) -> None:
        """Hold a session's K/V; the least recently used go when there is no room."""
        self.cached[session] = tokens
        self.cached.move_to_end(session)
        while len(self.cached) > 1 and sum(self.cached.values()) > self.heartbeat.total_tokens:
            self.cached.popitem(last=False)


@dataclass
class _Session:
    """A session in virtual time."""

    visit: Visit
    state: DraftSession
    served: Served
    sent: Verify | None = None
    draft: Draft | None = None


@dataclass
class _Run:
    """One virtual run."""

    arrivals: Arrivals
    rules: SchedulingRules
    drafting: Drafting
    sessions: dict[str, _Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._dispatcher = Dispatcher("virtual", self.rules)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._open = len(self.arrivals.visits)
        self._verifiers: dict[str, _Verifier] = {}
        self._paces: dict[str, Pace] = {}
        self._marginal = Marginal()
        self.batches: list[int] = []
        self.now_ms = 0.0

    def play(self) -> Figures:
        found = self.arrivals
        start_ms = min(visit.start_ms for visit in found.visits)
        self._set_up(start_ms)
        for visit in found.visits:
            self._at(visit.start_ms, partial(self._begin, visit))
        limit_ms = start_ms + max(SHORTEST_MS, LONGEST_FACTOR * (found.end_ms - start_ms))
        while self._events and self._open and self.now_ms <= limit_ms:
            self.now_ms, _, happen = heapq.heappop(self._events)
            happen(self.now_ms)
            self._dispatch()
        return figures([session.served for session in self.sessions.values()], self.batches)

    def _set_up(self, start_ms: float) -> None:
        """Verifiers come, tell their cost models, and beat as long as they did."""
        found = self.arrivals
        last: dict[str, float] = {}
        models: dict[str, CostModel] = {}
        for at_ms, heartbeat in found.heartbeats:
            last[heartbeat.verifier] = at_ms
        for at_ms, model in found.cost_models:
            # The first was known before, only not recorded.
            known_ms = at_ms if model.verifier in models else min(at_ms, start_ms)
            models[model.verifier] = model
            self._at(known_ms, partial(self._dispatcher.on_cost_model, model))
        for at_ms, heartbeat in found.heartbeats:
            name = heartbeat.verifier
            heard_ms = at_ms
            if name not in self._verifiers:
                lasts = found.end_ms - last[name] < SILENT_MS
                until_ms = math.inf if lasts else last[name]
                self._verifiers[name] = _Verifier(heartbeat, until_ms, models.get(name, cost.FALLBACK))
                # One that is heard of soon after the beginning was there before.
                heard_ms = min(at_ms, start_ms) if at_ms - start_ms < SILENT_MS else at_ms
            self._at(heard_ms, partial(self._beat, heartbeat))
        for name, verifier in self._verifiers.items():
            if verifier.until_ms == math.inf:
                self._at(last[name] + HEARTBEAT_MS, partial(self._beat_on, name))
        self._at(start_ms + LOAD_MS, self._tell_load)

    def _at(self, at_ms: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_ms, next(self._order), happen))

    def _beat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        """A heartbeat, with what the verifier holds in this run."""
        verifier = self._verifiers[heartbeat.verifier]
        verifier.heartbeat = heartbeat
        held = [{"session": name, "cached": tokens} for name, tokens in verifier.cached.items()]
        free = max(0, heartbeat.total_tokens - sum(verifier.cached.values()))
        fields = {**heartbeat.model_dump(), "residency": held, "free_tokens": free}
        self._dispatcher.on_heartbeat(Heartbeat.model_validate(fields), now_ms)

    def _beat_on(self, name: str, now_ms: float) -> None:
        """Beyond the end of the recording."""
        self._beat(self._verifiers[name].heartbeat, now_ms)
        self._at(now_ms + HEARTBEAT_MS, partial(self._beat_on, name))

    def _tell_load(self, now_ms: float) -> None:
        told = self._dispatcher.load(now_ms)
        for pace in self._paces.values():
            pace.hear(told)
        self._at(now_ms + LOAD_MS, self._tell_load)

    def _begin(self, visit: Visit, now_ms: float) -> None:
        state = DraftSession(visit.generate, list(visit.generate.prompt))
        session = _Session(visit, state, Served(state.name, visit.generate.slo, visit.generate.service_class, now_ms))
        self.sessions[visit.generate.session] = session
        self._draft(session, now_ms)

    def _draft(self, session: _Session, now_ms: float) -> None:
        """The drafter's part of a round: it arrives at the scheduler when it is over."""
        base_len = len(session.state.tokens)
        draft = session.visit.draft_at(base_len)
        length = self._length(draft)
        # The last token is the target's own.
        length = min(length, len(session.visit.text) - base_len - 1, session.state.draft_room(length))
        right = min(draft.right, length)
        text = session.visit.text[base_len : base_len + length]
        tokens = text[:right] + [token + 1 for token in text[right:]]
        share = length / len(draft.acceptance) if draft.acceptance else 1.0
        draft_ms = draft.draft_ms * share
        session.draft = draft

        def arrive(at_ms: float) -> None:
            verify = session.state.verify(
                tokens, draft.acceptance[:length], draft.drafter, at_ms - session.served.start_ms, draft_ms
            )
            session.sent = verify
            self._dispatcher.on_verify(verify, at_ms)

        self._at(now_ms + draft.away_ms - draft.draft_ms + draft_ms, arrive)

    def _length(self, draft: Draft) -> int:
        """How much of a recorded draft the stop rule sends."""
        longest = len(draft.acceptance)
        if self.drafting.longest is not None:
            longest = min(longest, self.drafting.longest)
        if self.drafting.rule != "marginal":
            return longest
        pace = self._paces.setdefault(draft.drafter, Pace())
        longest = min(longest, pace.draft_cap)
        step_ms = draft.draft_ms / len(draft.acceptance) if draft.acceptance else 0.0
        standing = Standing(pace.base_ms)
        length = 0
        for acceptance in draft.acceptance[:longest]:
            if not self._marginal.goes_on(standing, [acceptance], step_ms, pace.token_ms):
                break
            standing.ms += step_ms
            standing.keep(acceptance, pace.token_ms)
            length += 1
        return length

    def _dispatch(self) -> None:
        sends, later_ms = self._dispatcher.dispatch(self.now_ms)
        for name, batch in sends:
            self._verify(self._verifiers[name], batch)
        for name, sessions in self._dispatcher.releases().items():
            for session in sessions:
                self._verifiers[name].cached.pop(session, None)
        if later_ms is not None:
            self._at(max(later_ms, self.now_ms), lambda _: None)

    def _verify(self, verifier: _Verifier, batch: Batch) -> None:
        """A batch on its verifier: when it is over, its results are."""
        self.batches.append(len(batch.jobs))
        shape = cost.EMPTY
        computed = []
        for job in batch.jobs:
            held = min(verifier.holds(job.session), job.base_len - 1)
            chunk = job.prefill_to is not None
            length = job.prefill_to if job.prefill_to is not None else job.base_len + len(job.draft)
            new = max(0, length - held)
            shape = cost.grow(shape, new, length, 0 if chunk else len(job.draft) + 1)
            verifier.keep(job.session, max(held, length))
            computed.append((job, new))
        took_ms = cost.predict_ms(verifier.model, shape) * self._slowness(verifier)
        begun_ms = max(self.now_ms + self.arrivals.hop_ms / 2, verifier.free_ms)
        verifier.free_ms = begun_ms + took_ms

        def done(now_ms: float) -> None:
            if now_ms <= verifier.until_ms:
                for job, new in computed:
                    self._judge(verifier, batch, job, new, took_ms, now_ms)

        self._at(verifier.free_ms + self.arrivals.hop_ms / 2, done)

    def _slowness(self, verifier: _Verifier) -> float:
        return self.arrivals.slowness.get(verifier.heartbeat.verifier, verifier.model.ratio_p50)

    def _judge(self, verifier: _Verifier, batch: Batch, job: Job, new: int, took_ms: float, now_ms: float) -> None:
        session = self.sessions[job.session]
        if session.state.round != job.round or session.sent is None:
            return
        text = session.visit.text
        accepted, tokens, finish = 0, [], None
        if job.prefill_to is None:
            choices = text[job.base_len : job.base_len + len(job.draft) + 1]
            verdict = accept(job.draft[: len(choices) - 1], choices, len(choices), frozenset())
            accepted, tokens = verdict.accepted, verdict.tokens
            finish = Finish.STOP if job.base_len + len(tokens) == len(text) else None
            verifier.keep(job.session, job.base_len + accepted)
            session.served.job(job.queue_ms, job.drafted, len(job.draft), accepted)
        if finish is not None:
            verifier.cached.pop(job.session, None)
        result = Result(
            session=job.session,
            round=job.round,
            base_len=job.base_len,
            status=Status.COMMITTED if job.prefill_to is None else Status.PREFILLED,
            verifier=verifier.heartbeat.verifier,
            batch=batch.batch,
            accepted=accepted,
            tokens=tokens,
            drafted=job.drafted,
            trimmed_to=len(job.draft),
            finish=finish,
            cached=verifier.holds(job.session),
            new_tokens=new,
            queue_ms=job.queue_ms,
            verify_ms=took_ms,
        )
        self._dispatcher.on_result(result, now_ms)
        if not session.state.apply(result):
            return
        session.served.got(len(tokens), now_ms)
        if session.state.first_ms is None:
            session.state.first_ms = now_ms - session.served.start_ms
        pace = self._paces.setdefault(session.sent.drafter, Pace())
        pace.learn_round(len(job.draft), job.queue_ms + took_ms + self.arrivals.hop_ms, took_ms, job.queue_ms, new)
        if finish is not None:
            session.served.complete = session.visit.whole
            self._open -= 1
        else:
            self._draft(session, now_ms)


def what_if(arrivals: Arrivals, rules: SchedulingRules, drafting: Drafting) -> Figures:
    """What these rules would have made of what arrived. Needs at least one visit, and one heartbeat."""
    return _Run(arrivals, rules, drafting).play()
