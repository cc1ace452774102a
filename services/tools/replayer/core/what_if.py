"""Recorded traffic under another batch policy or stop rule, in virtual time.

The scheduler's dispatcher, the drafter's session and stop rule, and the verifier's acceptance are the code that runs
live. A verifier takes the time that its last recorded cost model predicts, times its recorded slowness; a drafter takes
the recorded time. Requests arrive when they were recorded: a run does not model clients that would have sent their next
request sooner, nor requests that would have been refused.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal

from services.drafter.control.rules import Marginal, NextTokens, RoundForecast
from services.drafter.control.times import RoundTimes
from services.drafter.core.session import DraftSession
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.tools.replayer.core.performance import Performance, ServedRequest, performance
from services.tools.replayer.core.traffic import RecordedDraft, RecordedRequest, RecordedTraffic
from services.verifier.core.acceptance import accept
from shared import cost
from shared.arithmetic import distinct
from shared.messages import SILENT_MS, Batch, CostModel, Finish, Heartbeat, Job, Result, Status, Verify

HEARTBEAT_MS = 500.0
LOAD_MS = 500.0
LONGEST_FACTOR = 20.0
"""A run ends after this many times the recording's duration, since the policy does not keep up."""
SHORTEST_MS = 60_000.0
"""A run may last at least this long."""

ReplayedRule = Literal["recorded", "marginal"]
"""`recorded` keeps the recorded draft lengths. `marginal` decides anew how much of each recorded draft to send. No rule
can draft tokens that were not drafted live."""


@dataclass(frozen=True)
class DraftPlan:
    """Choice of how much of each recorded draft is sent."""

    rule: ReplayedRule = "recorded"
    longest: int | None = None
    """Most draft tokens of a round; 0 is plain decoding, None sets no limit."""


def what_if(traffic: RecordedTraffic, rules: SchedulingRules, plan: DraftPlan) -> Performance:
    """Return the performance of a scheduler with these rules. `traffic` needs a request and a heartbeat."""
    return _VirtualRun(traffic, rules, plan).run()


class _VirtualVerifier:
    """A verifier's cache and the time at which it is free."""

    def __init__(self, heartbeat: Heartbeat, until_ms: float, model: CostModel, slowness: float) -> None:
        self.heartbeat = heartbeat
        self.until_ms = until_ms
        """The last recorded heartbeat, after which the verifier is gone; infinite if it stayed."""
        self.free_ms = 0.0
        self.cached: OrderedDict[str, int] = OrderedDict()
        self.runs: dict[str, int] = {}
        """Tokens that sessions in runs may still get."""
        self._model = model
        self._slowness = slowness

    def current_heartbeat(self) -> Heartbeat:
        """Return the recorded heartbeat with this run's cache."""
        residency = [{"session": session_id, "cached": tokens} for session_id, tokens in self.cached.items()]
        free = max(0, self.heartbeat.total_tokens - sum(self.cached.values()))
        fields = {**self.heartbeat.model_dump(), "residency": residency, "free_tokens": free}
        return Heartbeat.model_validate(fields)

    def holds(self, session_id: str) -> int:
        return self.cached.get(session_id, 0)

    def keep(self, session_id: str, tokens: int) -> None:
        """Hold a session's KV; evict the least recently used sessions when the cache is full."""
        self.cached[session_id] = tokens
        self.cached.move_to_end(session_id)
        while len(self.cached) > 1 and sum(self.cached.values()) > self.heartbeat.total_tokens:
            self.cached.popitem(last=False)

    def compute(self, jobs: Sequence[Job]) -> tuple[list[int], float]:
        """Take a batch and a token of each run into the cache; return each job's new tokens, and the time in ms."""
        shape = cost.EMPTY
        new_tokens = []
        for session_id in self.runs:
            shape = cost.grow(shape, 1, self.holds(session_id) + 1, 1)
            self.keep(session_id, self.holds(session_id) + 1)
        for job in jobs:
            held = min(self.holds(job.session), job.base_len - 1)
            chunk = job.prefill_to is not None
            length = job.prefill_to if job.prefill_to is not None else job.base_len + len(job.draft)
            new_tokens.append(max(0, length - held))
            shape = cost.grow(shape, new_tokens[-1], length, 0 if chunk else len(job.draft) + 1)
            self.keep(job.session, max(held, length))
        return new_tokens, cost.predict_ms(self._model, shape) * self._slowness


@dataclass
class _VirtualSession:
    """A session and its drafter's state."""

    request: RecordedRequest
    state: DraftSession
    served: ServedRequest
    sent: Verify | None = None


class _VirtualRun:
    """One run: events in order of time, and the scheduler after each of them."""

    def __init__(self, traffic: RecordedTraffic, rules: SchedulingRules, plan: DraftPlan) -> None:
        self._traffic = traffic
        self._plan = plan
        self._dispatcher = Dispatcher("virtual", rules)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._now_ms = 0.0
        self._open = len(traffic.requests)
        self._sessions: dict[str, _VirtualSession] = {}
        self._verifiers: dict[str, _VirtualVerifier] = {}
        self._times: dict[str, RoundTimes] = {}
        self._marginal = Marginal()
        self._batch_sizes: list[int] = []

    def run(self) -> Performance:
        traffic = self._traffic
        start_ms = min(request.start_ms for request in traffic.requests)
        self._schedule_cost_models(start_ms)
        self._schedule_heartbeats(start_ms)
        self._at(start_ms + LOAD_MS, self._publish_load)
        for request in traffic.requests:
            self._at(request.start_ms, partial(self._begin, request))
        limit_ms = start_ms + max(SHORTEST_MS, LONGEST_FACTOR * (traffic.end_ms - start_ms))
        while self._events and self._open and self._now_ms <= limit_ms:
            self._now_ms, _, happen = heapq.heappop(self._events)
            happen(self._now_ms)
            self._dispatch()
        return performance([session.served for session in self._sessions.values()], self._batch_sizes)

    def _at(self, at_ms: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_ms, next(self._order), happen))

    def _schedule_cost_models(self, start_ms: float) -> None:
        seen = set()
        for at_ms, model in self._traffic.cost_models:
            # A verifier's first recorded model holds from the start: an earlier one was not recorded.
            from_ms = at_ms if model.verifier in seen else min(at_ms, start_ms)
            seen.add(model.verifier)
            self._at(from_ms, partial(self._dispatcher.on_cost_model, model))

    def _schedule_heartbeats(self, start_ms: float) -> None:
        """Schedule the recorded heartbeats, and further ones from verifiers that were alive at the recording's end."""
        traffic = self._traffic
        models = {model.verifier: model for _, model in traffic.cost_models}
        last_ms = {heartbeat.verifier: at_ms for at_ms, heartbeat in traffic.heartbeats}
        for at_ms, heartbeat in traffic.heartbeats:
            name = heartbeat.verifier
            from_ms = at_ms
            if name not in self._verifiers:
                alive = traffic.end_ms - last_ms[name] < SILENT_MS
                model = models.get(name, cost.FALLBACK)
                slowness = traffic.slowness.get(name, model.ratio_p50)
                until_ms = math.inf if alive else last_ms[name]
                self._verifiers[name] = _VirtualVerifier(heartbeat, until_ms, model, slowness)
                # A verifier with a heartbeat soon after the start was there before it.
                from_ms = min(at_ms, start_ms) if at_ms - start_ms < SILENT_MS else at_ms
            self._at(from_ms, partial(self._heartbeat, heartbeat))
        for name, verifier in self._verifiers.items():
            if verifier.until_ms == math.inf:
                self._at(last_ms[name] + HEARTBEAT_MS, partial(self._repeat_heartbeat, name))

    def _heartbeat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        verifier = self._verifiers[heartbeat.verifier]
        verifier.heartbeat = heartbeat
        self._dispatcher.on_heartbeat(verifier.current_heartbeat(), now_ms)

    def _repeat_heartbeat(self, name: str, now_ms: float) -> None:
        """Send the last heartbeat again, after the end of the recording."""
        self._heartbeat(self._verifiers[name].heartbeat, now_ms)
        self._at(now_ms + HEARTBEAT_MS, partial(self._repeat_heartbeat, name))

    def _publish_load(self, now_ms: float) -> None:
        load = self._dispatcher.load(now_ms)
        for times in self._times.values():
            times.apply_load(load)
        self._at(now_ms + LOAD_MS, self._publish_load)

    def _begin(self, request: RecordedRequest, now_ms: float) -> None:
        generate = request.generate
        state = DraftSession(generate, list(generate.prompt))
        served = ServedRequest(generate.session, generate.slo, generate.service_class, now_ms)
        session = self._sessions[generate.session] = _VirtualSession(request, state, served)
        self._draft(session, now_ms)

    def _draft(self, session: _VirtualSession, now_ms: float) -> None:
        """Draft a round, which reaches the scheduler after the recorded time."""
        base_len = len(session.state.tokens)
        draft = session.request.draft_at(base_len)
        length = self._length(draft)
        # The target chooses the last token of a text itself.
        length = min(length, len(session.request.text) - base_len - 1, session.state.draft_room(length))
        right = min(draft.right, length)
        text = session.request.text[base_len : base_len + length]
        tokens = text[:right] + [token + 1 for token in text[right:]]
        draft_ms = draft.draft_ms * (length / len(draft.acceptance) if draft.acceptance else 1.0)

        def arrive(at_ms: float) -> None:
            elapsed_ms = at_ms - session.served.start_ms
            acceptance = draft.acceptance[:length]
            session.sent = session.state.verify(
                tokens, acceptance, draft.drafter_id, elapsed_ms, draft_ms, run_tokens=0 if tokens else draft.run_tokens
            )
            self._dispatcher.on_verify(session.sent, at_ms)

        self._at(now_ms + draft.away_ms - draft.draft_ms + draft_ms, arrive)

    def _length(self, draft: RecordedDraft) -> int:
        """Return how many tokens of a recorded draft are sent."""
        longest = len(draft.acceptance)
        if self._plan.longest is not None:
            longest = min(longest, self._plan.longest)
        if self._plan.rule != "marginal":
            return longest
        times = self._times.setdefault(draft.drafter_id, RoundTimes())
        longest = min(longest, times.draft_cap)
        step_ms = draft.draft_ms / len(draft.acceptance) if draft.acceptance else 0.0
        plain_rate = 0.0 if times.run_ms is None else 1 / times.run_ms
        forecast = RoundForecast(
            times.base_ms, [times.added_ms(count) for count in range(longest + 1)], plain_rate=plain_rate
        )
        length = 0
        for acceptance in draft.acceptance[:longest]:
            if not self._marginal.goes_on(forecast, NextTokens(step_ms, [acceptance], acceptance)):
                break
            forecast.ms += step_ms
            forecast.keep(acceptance)
            length += 1
        return length

    def _dispatch(self) -> None:
        sends, later_ms = self._dispatcher.dispatch(self._now_ms)
        for name, batch in sends:
            self._verify(self._verifiers[name], batch)
        for name, session_ids in self._dispatcher.releases().items():
            for session_id in session_ids:
                self._verifiers[name].cached.pop(session_id, None)
        for name, session_ids in self._dispatcher.halts().items():
            runs = self._verifiers[name].runs
            runs.update({session_id: 1 for session_id in session_ids if session_id in runs})
        if later_ms is not None:
            self._at(max(later_ms, self._now_ms), lambda _: None)

    def _verify(self, verifier: _VirtualVerifier, batch: Batch) -> None:
        """Run a batch on its verifier, with a token of each run; its results arrive when it is done."""
        self._batch_sizes.append(len(batch.jobs))
        in_runs = list(verifier.runs)
        new_tokens, took_ms = verifier.compute(batch.jobs)
        begun_ms = max(self._now_ms + self._traffic.hop_ms / 2, verifier.free_ms)
        verifier.free_ms = begun_ms + took_ms
        self._at(verifier.free_ms, partial(self._decode, verifier, in_runs, took_ms))

        def done(now_ms: float) -> None:
            if now_ms <= verifier.until_ms:
                for job, new in zip(batch.jobs, new_tokens, strict=True):
                    self._finish(verifier, batch, job, new, took_ms, now_ms)

        self._at(verifier.free_ms + self._traffic.hop_ms / 2, done)

    def _step(self, verifier: _VirtualVerifier, now_ms: float) -> None:
        """Run a step of the runs alone, unless the verifier is busy. The end of the verifier's work calls this again.

        If the verifier is gone, its sessions in runs continue with a round.
        """
        if now_ms > verifier.until_ms:
            for session_id in list(verifier.runs):
                del verifier.runs[session_id]
                self._draft(self._sessions[session_id], now_ms)
        if verifier.runs and now_ms >= verifier.free_ms and now_ms <= verifier.until_ms:
            in_runs = list(verifier.runs)
            _, took_ms = verifier.compute([])
            verifier.free_ms = now_ms + took_ms
            self._at(verifier.free_ms, partial(self._decode, verifier, in_runs, took_ms))

    def _decode(self, verifier: _VirtualVerifier, in_runs: Sequence[str], took_ms: float, now_ms: float) -> None:
        """Give each of these runs the token of the step that ends now, and begin the next step."""
        for session_id in in_runs:
            if now_ms > verifier.until_ms or session_id not in verifier.runs:
                continue
            session = self._sessions[session_id]
            base_len, text = len(session.state.tokens), session.request.text
            ended = base_len + 1 == len(text)
            left = verifier.runs[session_id] = 0 if ended else verifier.runs[session_id] - 1
            result = Result(
                session=session_id,
                round=session.state.round,
                base_len=base_len,
                status=Status.COMMITTED,
                verifier=verifier.heartbeat.verifier,
                batch="run",
                tokens=[text[base_len]],
                run=True,
                run_left=left,
                finish=Finish.STOP if ended else None,
                cached=verifier.holds(session_id),
                new_tokens=1,
                verify_ms=took_ms,
                committed_in=distinct([*session.state.committed_in, verifier.heartbeat.arithmetic]),
            )
            if not left:
                del verifier.runs[session_id]
            if ended:
                verifier.cached.pop(session_id, None)
            self._dispatcher.on_result(result, now_ms + self._traffic.hop_ms / 2)
            session.state.apply(result)
            self._arrived(session, result, now_ms + self._traffic.hop_ms / 2)
        self._at(now_ms, partial(self._step, verifier))

    def _arrived(self, session: _VirtualSession, result: Result, now_ms: float) -> None:
        """Count a result's tokens; begin the session's next round unless its text has ended or a run goes on."""
        session.served.add_tokens(len(result.tokens), now_ms)
        if session.state.first_ms is None:
            session.state.first_ms = now_ms - session.served.start_ms
        if result.finish is not None:
            session.served.complete = session.request.complete
            self._open -= 1
        elif not result.run_left:
            self._draft(session, now_ms)

    def _finish(
        self, verifier: _VirtualVerifier, batch: Batch, job: Job, new: int, took_ms: float, now_ms: float
    ) -> None:
        """Deliver a job's result to the scheduler and the drafter, and begin the session's next round."""
        session = self._sessions[job.session]
        sent = session.sent
        if session.state.round != job.round or sent is None:
            return
        result = self._judge(verifier, batch, job, new, took_ms)
        self._dispatcher.on_result(result, now_ms)
        if not session.state.apply(result):
            return
        times = self._times.setdefault(sent.drafter, RoundTimes())
        times.learn_round(len(job.draft), job.queue_ms + took_ms + self._traffic.hop_ms, took_ms, job.queue_ms, new)
        if result.run_left:
            verifier.runs[job.session] = result.run_left
            self._at(max(now_ms, verifier.free_ms), partial(self._step, verifier))
        self._arrived(session, result, now_ms)

    def _judge(self, verifier: _VirtualVerifier, batch: Batch, job: Job, new: int, took_ms: float) -> Result:
        """Return a job's result: the accepted draft tokens and the text's next token, or a chunk of prefill."""
        session = self._sessions[job.session]
        text = session.request.text
        accepted, tokens, finish = 0, [], None
        if job.prefill_to is None:
            choices = text[job.base_len : job.base_len + len(job.draft) + 1]
            verdict = accept(job.draft[: len(choices) - 1], choices, len(choices), frozenset())
            accepted, tokens = verdict.accepted, verdict.tokens
            finish = Finish.STOP if job.base_len + len(tokens) == len(text) else None
            verifier.keep(job.session, job.base_len + accepted)
            session.served.add_round(job.queue_ms, job.drafted, len(job.draft), accepted)
        if finish is not None:
            verifier.cached.pop(job.session, None)
        return Result(
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
            run_left=job.run.tokens if job.run is not None and finish is None else 0,
            cached=verifier.holds(job.session),
            new_tokens=new,
            queue_ms=job.queue_ms,
            verify_ms=took_ms,
            committed_in=distinct([*session.state.committed_in, verifier.heartbeat.arithmetic]),
        )
