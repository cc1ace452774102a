"""Closed-loop sessions in virtual time, served by the suite's scheduler with runs and by centralized serving.

Both decide with the code that runs live, and a step takes the time that one cost model predicts. Nothing is drafted:
the suite's drafters leave every session to its verifier. The suite has what centralized serving does not need: hops,
commits that take a while, and reports of runs.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean, median

import builders

from services.baseline.core.batching import Batcher, SequenceState
from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import PolicyOptions
from services.verifier.core.runs import REPORT_MS
from shared import cost, slo
from shared.engine.blocks import BlockPool
from shared.kernels.layout import BLOCK
from shared.messages import Batch, CostModel, Finish, Job, Result, Slo, Status, Verify

HOP_MS = 2.0
COMMIT_MS = 4.0
HEARTBEAT_MS = 500.0
CACHE_TOKENS = 32_768
PREFILL_TOKENS = 128
"""Prompt tokens in a step of centralized serving: its default."""
MODEL = builders.cost_model(coefficients=(17.0, 0.0, 2.7, 1000.0, 1000.0, 0.5, 2.0))
"""The default model on one core without AVX-512."""
INTERACTIVE = Slo(ttft_ms=1500.0, tpot_ms=110.0)
STANDARD = Slo(ttft_ms=4000.0, tpot_ms=220.0)


@dataclass
class SimulatedRequest:
    """One request, and when its tokens came."""

    name: str
    prompt: int
    outputs: int
    slo: Slo | None
    start_ms: float
    came_ms: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return self.came_ms[0] - self.start_ms

    @property
    def tpot_ms(self) -> float:
        return (self.came_ms[-1] - self.came_ms[0]) / max(1, len(self.came_ms) - 1)

    @property
    def attained(self) -> bool:
        if self.slo is None:
            return True
        return self.ttft_ms <= self.slo.ttft_ms and self.tpot_ms <= self.slo.tpot_ms


@dataclass(frozen=True)
class SimulatedLoad:
    """Requests of sessions that ask, read the answer, think and ask again. Both ways of serving get the same ones."""

    sessions: int
    seed: int = 0
    long_share: float = 0.1
    slos: Sequence[Slo | None] = (INTERACTIVE, STANDARD)

    def request(self, session: int, number: int, after_ms: float) -> SimulatedRequest:
        """Return a session's request with this number, whose answer before it ended at `after_ms`."""
        draw = random.Random(f"{self.seed}/{session}/{number}")
        long = draw.random() < self.long_share
        prompt = round(draw.uniform(530, 930) if long else 30 + min(150, max(20, draw.lognormvariate(3.9, 0.6))))
        outputs, think_ms = draw.randint(32, 96), draw.uniform(0, 1000)
        return SimulatedRequest(
            f"s{session}-{number}", prompt, outputs, draw.choice(list(self.slos)), after_ms + think_ms
        )


@dataclass(frozen=True)
class SimulatedOutcome:
    """The requests that were sent between the warm-up and the end, and the tokens that came in this time."""

    requests: list[SimulatedRequest]
    tokens_per_s: float

    def of(self, slo_: Slo | None) -> list[SimulatedRequest]:
        """Return the requests with this SLO."""
        return [one for one in self.requests if one.slo is slo_]

    @property
    def attained(self) -> float:
        return fmean(one.attained for one in self.requests)

    @property
    def ttft_ms(self) -> float:
        """Mean time to first token."""
        return fmean(one.ttft_ms for one in self.requests)

    @property
    def tpot_ms(self) -> float:
        return fmean(one.tpot_ms for one in self.requests)

    def row(self) -> str:
        """Return the figures as a line of a table."""
        ttfts = sorted(one.ttft_ms for one in self.requests)
        tpots = sorted(one.tpot_ms for one in self.requests)
        last = int(0.95 * len(ttfts))
        return (
            f"TTFT {median(ttfts):6.0f} / {ttfts[last]:6.0f}  TPOT {median(tpots):5.0f} / {tpots[last]:5.0f}  "
            f"attained {self.attained:.2f}  tokens/s {self.tokens_per_s:.1f}"
        )


class Clock:
    """Events in virtual time."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, at_ms: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ms, next(self._order), happen))

    def run(self, until_ms: float, after_each: Callable[[], None]) -> None:
        while self._events and self._events[0][0] <= until_ms:
            self.now_ms, _, happen = heapq.heappop(self._events)
            happen()
            after_each()


class _Serving:
    """Sessions in a closed loop; a subclass serves their requests."""

    def __init__(self, load: SimulatedLoad, model: CostModel) -> None:
        self.load = load
        self.model = model
        self.clock = Clock()
        self.requests: list[SimulatedRequest] = []

    def run(self, warm_up_s: float, measure_s: float) -> SimulatedOutcome:
        """Serve requests; return those that were sent after the warm-up and have ended."""
        for session in range(self.load.sessions):
            self._next(session, 0)
        from_ms, until_ms = warm_up_s * 1000, (warm_up_s + measure_s) * 1000
        self.clock.run(until_ms, self.decide)
        ended = [one for one in self.requests if one.start_ms >= from_ms and len(one.came_ms) == one.outputs]
        came = sum(from_ms <= at < until_ms for one in self.requests for at in one.came_ms)
        return SimulatedOutcome(ended, came / measure_s)

    def _next(self, session: int, number: int) -> None:
        request = self.load.request(session, number, self.clock.now_ms)
        self.requests.append(request)

        def ended() -> None:
            self._next(session, number + 1)

        self.clock.at(request.start_ms, lambda: self.serve(request, ended))

    def serve(self, request: SimulatedRequest, ended: Callable[[], None]) -> None:
        raise NotImplementedError

    def decide(self) -> None:
        """Called after each event."""


class Centralized(_Serving):
    """Continuous batching (`services.baseline`)."""

    def __init__(self, load: SimulatedLoad, model: CostModel = MODEL) -> None:
        super().__init__(load, model)
        self._pool = BlockPool(CACHE_TOKENS // BLOCK)
        self._batcher = Batcher(self, block_tokens=BLOCK, prefill_tokens=PREFILL_TOKENS, max_running=64)
        self._open: dict[str, tuple[SimulatedRequest, Callable[[], None]]] = {}
        self._ids = count(1)
        self._busy = False

    @property
    def free_tokens(self) -> int:
        return self._pool.available * BLOCK

    def cached(self, session: str) -> int:
        return self._pool.length(session)

    def attach(self, session: str, tokens: Sequence[int]) -> int:
        return self._pool.attach(session, tokens)

    def release(self, session: str) -> None:
        self._pool.release(session)

    def serve(self, request: SimulatedRequest, ended: Callable[[], None]) -> None:
        tokens = [next(self._ids) for _ in range(request.prompt)]
        self._open[request.name] = request, ended
        self._batcher.add(SequenceState(request.name, tokens, request.prompt + request.outputs))

    def decide(self) -> None:
        if self._busy or not (parts := self._batcher.next_step()):
            return
        fed = {}
        for part in parts:
            tokens, to = part.sequence.tokens, part.prefill_to
            fed[part.sequence.session_id] = tokens[self.cached(part.sequence.session_id) : to]
        self._pool.grow({session_id: len(tokens) for session_id, tokens in fed.items()})
        jobs = []
        for part in parts:
            session_id = part.sequence.session_id
            self._pool.append(session_id, fed[session_id])
            jobs.append((len(fed[session_id]), self.cached(session_id), int(part.prefill_to is None)))
        self._busy = True

        def done() -> None:
            self._busy = False
            for part in parts:
                if part.prefill_to is None:
                    self._token(part.sequence)

        self.clock.at(self.clock.now_ms + cost.predict_ms(self.model, cost.shape_of(jobs)), done)

    def _token(self, sequence: SequenceState) -> None:
        sequence.tokens.append(next(self._ids))
        request, ended = self._open[sequence.session_id]
        request.came_ms.append(self.clock.now_ms)
        if len(request.came_ms) == request.outputs:
            self._batcher.remove(sequence)
            ended()


@dataclass
class _SuiteSession:
    """A session in its drafter and its verifier."""

    request: SimulatedRequest
    ended: Callable[[], None]
    round: int = 0
    """Number of the session's next round or report."""
    length: int = 0
    """Committed tokens."""
    held: int = 0
    """Tokens in the verifier's cache."""
    run_left: int = 0
    unreported: int = 0
    reported_ms: float = 0.0


class Suite(_Serving):
    """The scheduler, a verifier's continuous loop and drafters that draft nothing."""

    def __init__(
        self,
        load: SimulatedLoad,
        model: CostModel = MODEL,
        *,
        policy: str = "wisp+",
        run_tokens: int = 64,
        predicted: float = 1.0,
    ) -> None:
        """predicted: what the scheduler predicts, as a multiple of the time that a step takes."""
        super().__init__(load, model)
        rules = SchedulingRules(policy, BatchLimits(400.0, 2048, 3000.0), options=PolicyOptions())
        self._scheduler = Dispatcher("s", rules)
        self._sessions: dict[str, _SuiteSession] = {}
        self._queue: list[Batch] = []
        self._busy = False
        self._run_tokens = run_tokens
        self._woken_ms = -1.0
        self._beat()
        coefficients = [predicted * one for one in model.coefficients]
        self._scheduler.on_cost_model(model.model_copy(update={"coefficients": coefficients}), 0.0)

    def _beat(self) -> None:
        held = {name: one.held for name, one in self._sessions.items() if one.held}
        free = CACHE_TOKENS - sum(held.values())
        beat = builders.heartbeat("v1", held, lease=1, total_tokens=CACHE_TOKENS, free_tokens=max(0, free))
        self._scheduler.on_heartbeat(beat, self.clock.now_ms)
        self.clock.at(self.clock.now_ms + HEARTBEAT_MS, self._beat)

    def serve(self, request: SimulatedRequest, ended: Callable[[], None]) -> None:
        self._sessions[request.name] = _SuiteSession(request, ended, length=request.prompt)
        self._send(request.name)

    def _send(self, name: str) -> None:
        """Send the session's next round, which leaves the tokens after it to the verifier."""
        session, request = self._sessions[name], self._sessions[name].request
        first_ms = request.ttft_ms if request.came_ms else None
        elapsed_ms = self.clock.now_ms + HOP_MS - request.start_ms
        round_: Verify = builders.verify(
            name,
            session.round,
            session.length,
            run_tokens=self._run_tokens,
            slack_ms=slo.slack_ms(request.slo, elapsed_ms, len(request.came_ms), first_ms),
            tpot_ms=None if request.slo is None else request.slo.tpot_ms,
        )
        self._after(HOP_MS, lambda: self._scheduler.on_verify(round_, self.clock.now_ms))

    def _after(self, ms: float, happen: Callable[[], None]) -> None:
        self.clock.at(self.clock.now_ms + ms, happen)

    def decide(self) -> None:
        sends, wake_ms = self._scheduler.dispatch(self.clock.now_ms)
        for _, batch in sends:
            self._after(HOP_MS, lambda batch=batch: self._queue.append(batch))  # type: ignore[misc]
        for names in self._scheduler.halts().values():
            for name in names:
                if name in self._sessions:
                    self._sessions[name].run_left = min(1, self._sessions[name].run_left)
        if wake_ms is not None and wake_ms > self.clock.now_ms and wake_ms != self._woken_ms:
            self._woken_ms = wake_ms
            self.clock.at(wake_ms, lambda: None)
        self._step()

    def _step(self) -> None:
        """Begin the verifier's next step if it is free: the next batch and a token of every run."""
        runs = [name for name, one in self._sessions.items() if one.run_left]
        if self._busy or not (self._queue or runs):
            return
        batch = self._queue.pop(0) if self._queue else None
        jobs = [] if batch is None else [job for job in batch.jobs if job.session in self._sessions]
        shape = [(1, self._sessions[name].length + 1, 1) for name in runs]
        for job in jobs:
            to = job.base_len if job.prefill_to is None else job.prefill_to
            new = max(to - min(self._sessions[job.session].held, job.base_len - 1), 0)
            shape.append((new, to, int(job.prefill_to is None)))
        took_ms = cost.predict_ms(self.model, cost.shape_of(shape))
        self._busy = True
        self._after(took_ms, lambda: self._stepped(batch, jobs, runs, took_ms))

    def _stepped(self, batch: Batch | None, jobs: Sequence[Job], runs: Sequence[str], took_ms: float) -> None:
        self._busy = False
        results = []
        for name in runs:
            if name in self._sessions and self._sessions[name].run_left:
                results += self._run_token(name, took_ms)
        for job in jobs:
            assert batch is not None
            results.append(self._settle(batch, job, took_ms))
        for result in results:
            self._after(COMMIT_MS, lambda result=result: self._deliver(result))  # type: ignore[misc]

    def _run_token(self, name: str, took_ms: float) -> list[Result]:
        session = self._sessions[name]
        session.run_left -= 1
        session.unreported += 1
        session.length += 1
        session.held = session.length - 1
        ended = session.length == session.request.prompt + session.request.outputs
        if ended:
            session.run_left = 0
        if session.run_left and self.clock.now_ms - session.reported_ms < REPORT_MS:
            return []
        count_, session.unreported, session.reported_ms = session.unreported, 0, self.clock.now_ms
        session.round += 1
        return [
            builders.result(
                name,
                session.round - 1,
                session.length - count_,
                [7] * count_,
                run=True,
                run_left=session.run_left,
                finish=Finish.LENGTH if ended else None,
                batch="run",
                cached=session.held,
                new_tokens=count_,
                verify_ms=took_ms,
            )
        ]

    def _settle(self, batch: Batch, job: Job, took_ms: float) -> Result:
        session = self._sessions[job.session]
        fields = {"batch": batch.batch, "queue_ms": job.queue_ms, "verify_ms": took_ms}
        if job.prefill_to is not None:
            new, session.held = max(0, job.prefill_to - session.held), max(session.held, job.prefill_to)
            return builders.result(
                job.session,
                job.round,
                job.base_len,
                status=Status.PREFILLED,
                cached=session.held,
                new_tokens=new,
                **fields,
            )
        assert (job.round, job.base_len) == (session.round, session.length), "every round is current in this simulation"
        new, session.held = job.base_len - min(session.held, job.base_len - 1), job.base_len
        session.round, session.length = session.round + 1, session.length + 1
        ended = session.length == session.request.prompt + session.request.outputs
        session.run_left = 0 if ended or job.run is None else job.run.tokens
        session.unreported, session.reported_ms = 0, self.clock.now_ms
        return builders.result(
            job.session,
            job.round,
            job.base_len,
            [7],
            run_left=session.run_left,
            finish=Finish.LENGTH if ended else None,
            cached=session.held,
            new_tokens=new,
            **fields,
        )

    def _deliver(self, result: Result) -> None:
        """Take a committed result to the scheduler, the client and the drafter."""
        name = result.session
        session = self._sessions[name]
        self._after(HOP_MS, lambda: self._scheduler.on_result(result, self.clock.now_ms))
        if result.status is Status.PREFILLED:
            return
        session.request.came_ms += [self.clock.now_ms + HOP_MS] * len(result.tokens)
        if result.finish is not None:
            del self._sessions[name]
            self._after(HOP_MS, session.ended)
        elif not result.run_left:
            self._after(HOP_MS, lambda: self._send(name))


if __name__ == "__main__":
    for sessions in (1, 2, 4, 6, 8, 12, 16):
        for kind, serving in (("centralized", Centralized), ("wisp+", Suite)):
            found = serving(SimulatedLoad(sessions)).run(20.0, 400.0)
            print(f"{sessions:3} {kind:12} {found.row()}")
