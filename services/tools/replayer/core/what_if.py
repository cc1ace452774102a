"""Recorded traffic under another batch policy or stop rule, in virtual time.

The scheduler's dispatcher, the drafter's session and stop rule, and the verifier's acceptance are the code that runs
live. A verifier takes the time that its last recorded cost model predicts, times its recorded slowness; a drafter takes
the recorded time. Sessions in runs copy where they copied in the recording. Requests arrive when they were recorded. So
clients that would have sent their next request sooner, and requests that would have been refused, are not modelled.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
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
from services.tools.replayer.core.virtual_verifier import NO_COPIES, StepCopies, VirtualVerifier
from services.verifier.core.acceptance import accept
from shared import cost
from shared.arithmetic import distinct
from shared.messages import SILENT_MS, Batch, Finish, Heartbeat, Job, Result, Status, Verify

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


@dataclass
class _VirtualSession:
    """A session and its drafter's state."""

    request: RecordedRequest
    state: DraftSession
    served: ServedRequest
    sent: Verify | None = None
    wrong_copies: float = 0.0
    """Wrong copies of its steps so far that no step has verified yet."""


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
        self._verifiers: dict[str, VirtualVerifier] = {}
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
                self._verifiers[name] = VirtualVerifier(heartbeat, until_ms, model, slowness)
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
                tokens, acceptance, draft.drafter_id, elapsed_ms, draft_ms,
                run_tokens=0 if tokens else draft.run_tokens, run_copies=draft.run_copies,
            )  # fmt: skip
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

    def _verify(self, verifier: VirtualVerifier, batch: Batch) -> None:
        """Run a batch on its verifier, with a token of each run; its results arrive when it is done."""
        self._batch_sizes.append(len(batch.jobs))
        in_runs = dict.fromkeys(verifier.runs, NO_COPIES)
        new_tokens, took_ms = verifier.compute(batch.jobs, in_runs)
        begun_ms = max(self._now_ms + self._traffic.hop_ms / 2, verifier.free_ms)
        verifier.free_ms = begun_ms + took_ms
        self._at(verifier.free_ms, partial(self._decode, verifier, in_runs, took_ms))

        def done(now_ms: float) -> None:
            if now_ms <= verifier.until_ms:
                for job, new in zip(batch.jobs, new_tokens, strict=True):
                    self._finish(verifier, batch, job, new, took_ms, now_ms)

        self._at(verifier.free_ms + self._traffic.hop_ms / 2, done)

    def _step(self, verifier: VirtualVerifier, now_ms: float) -> None:
        """Run a step of the runs alone, unless the verifier is busy. The end of the verifier's work calls this again.

        If the verifier is gone, its sessions in runs continue with a round.
        """
        if now_ms > verifier.until_ms:
            for session_id in list(verifier.runs):
                del verifier.runs[session_id]
                self._draft(self._sessions[session_id], now_ms)
        if verifier.runs and now_ms >= verifier.free_ms and now_ms <= verifier.until_ms:
            in_runs = {session_id: self._copies(verifier, session_id) for session_id in verifier.runs}
            _, took_ms = verifier.compute([], in_runs)
            verifier.free_ms = now_ms + took_ms
            self._at(verifier.free_ms, partial(self._decode, verifier, in_runs, took_ms))

    def _copies(self, verifier: VirtualVerifier, session_id: str) -> StepCopies:
        """Return the copies of a run in a step without a batch: those of the recording at this place of the text."""
        session = self._sessions[session_id]
        request, base_len = session.request, len(session.state.tokens)
        most = min(
            verifier.most_copied.get(session_id, 0), verifier.runs[session_id] - 1, len(request.text) - base_len - 1
        )
        if most < 1:
            return NO_COPIES
        accepted = next((i for i in range(most) if base_len + i not in request.copied), most)
        session.wrong_copies += request.wrong_copies
        wrong = min(int(session.wrong_copies), most - accepted)
        session.wrong_copies -= wrong
        return StepCopies(accepted, accepted + wrong)

    def _decode(
        self, verifier: VirtualVerifier, in_runs: Mapping[str, StepCopies], took_ms: float, now_ms: float
    ) -> None:
        """Give each of these runs the tokens of the step that ends now, and begin the next step."""
        for session_id, copies in in_runs.items():
            if now_ms > verifier.until_ms or session_id not in verifier.runs:
                continue
            session = self._sessions[session_id]
            base_len, text = len(session.state.tokens), session.request.text
            tokens = text[base_len : base_len + 1 + copies.accepted]
            ended = base_len + len(tokens) == len(text)
            left = verifier.runs[session_id] = 0 if ended else max(0, verifier.runs[session_id] - len(tokens))
            result = Result(
                session=session_id,
                round=session.state.round,
                base_len=base_len,
                status=Status.COMMITTED,
                verifier=verifier.heartbeat.verifier,
                batch="run",
                tokens=tokens,
                run=True,
                copied=list(range(copies.accepted)),
                trimmed_to=copies.verified,
                run_left=left,
                finish=Finish.STOP if ended else None,
                cached=verifier.holds(session_id),
                new_tokens=1 + copies.verified,
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
        self, verifier: VirtualVerifier, batch: Batch, job: Job, new: int, took_ms: float, now_ms: float
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
        if result.run_left and job.run is not None:
            verifier.runs[job.session], verifier.most_copied[job.session] = result.run_left, job.run.copies
            self._at(max(now_ms, verifier.free_ms), partial(self._step, verifier))
        self._arrived(session, result, now_ms)

    def _judge(self, verifier: VirtualVerifier, batch: Batch, job: Job, new: int, took_ms: float) -> Result:
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
