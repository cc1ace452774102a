"""A verifier in virtual time: its steps, its KV, and the sessions that it decodes in runs."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import simpy

from services.drafter.control import SessionControl
from services.drafter.core.session import DraftSession
from services.tools.simulator.core.drafts import DraftTokens
from services.tools.simulator.core.world import RIGHT, ClientRequest, Process, finish_of
from services.verifier.core.acceptance import accept
from services.verifier.core.runs import REPORT_MS
from shared import cost
from shared.messages import Batch, Heartbeat, Job, Measurement, Residency, Result, Status
from shared.twin.profile import TargetProfile

HEARTBEAT_MS = 500.0


@dataclass
class SimulatedSession:
    """A session: its drafter's state, and the results on their way to it."""

    served: ClientRequest
    state: DraftSession
    control: SessionControl
    drafts: DraftTokens
    inbox: simpy.Store
    length: int
    """Committed tokens."""

    @property
    def position(self) -> int:
        """Output tokens that the drafter has seen."""
        return self.state.output_tokens

    def take(self, result: Result) -> None:
        """Take a result that has reached the device."""
        self.inbox.put(result)


@dataclass
class _SimulatedRun:
    """A run: a session that its verifier decodes by itself."""

    session: SimulatedSession
    round: int
    """Round number of the next report."""
    base_len: int
    """Length of the session with the last report."""
    left: int
    until_ms: float
    reported_ms: float
    tokens: int = 0
    """Tokens since the last report."""
    verify_ms: float = 0.0


class VerifierWorld(Protocol):
    """The fleet around a verifier."""

    env: simpy.Environment
    target: TargetProfile
    batches: list[Measurement]

    @property
    def now_ms(self) -> float:
        """The virtual time."""

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Hand a verifier's heartbeat to the scheduler."""

    def session(self, session_id: str) -> SimulatedSession | None:
        """Return an open session; None if it has ended."""

    def publish(self, session: SimulatedSession, result: Result) -> None:
        """Send a result to the scheduler, to the session's drafter and to its client."""

    def settle_stale(self, job: Job, batch_id: str, verifier_id: str) -> None:
        """Tell the scheduler that a job's session has ended or has these tokens already."""


class SimulatedVerifier:
    """A verifier: its KV, its pending batches, and the sessions that it decodes in runs."""

    def __init__(self, world: VerifierWorld, verifier_id: str, speed: float) -> None:
        """speed: against the target's profile."""
        self.verifier_id = verifier_id
        self.draining = False
        """True if it is to stop once it has no work left."""
        self._speed = speed
        self._world = world
        self._batches: deque[Batch] = deque()
        self._runs: dict[str, _SimulatedRun] = {}
        self._cached: OrderedDict[str, int] = OrderedDict()
        self._held = 0
        self._wake = world.env.event()

    def put(self, batch: Batch) -> None:
        """Take a batch."""
        self._batches.append(batch)
        if not self._wake.triggered:
            self._wake.succeed()

    def halt(self, session_ids: Sequence[str]) -> None:
        """End these sessions' runs with their next step."""
        for session_id in session_ids:
            if (run := self._runs.get(session_id)) is not None:
                run.left = 1

    def release(self, session_id: str) -> None:
        """Free a session's KV."""
        self._held -= self._cached.pop(session_id, 0)

    def forget(self, session_id: str) -> None:
        """Free the KV of a session that was given up, and end its run."""
        self._runs.pop(session_id, None)
        self.release(session_id)

    def beat(self) -> Process:
        """Send heartbeats until it has stopped."""
        while not self.draining or self._batches or self._runs:
            self._world.on_heartbeat(
                Heartbeat(
                    verifier=self.verifier_id,
                    fingerprint="simulated",
                    max_len=min(1 << 20, self._world.target.kv_tokens),
                    free_tokens=max(0, self._world.target.kv_tokens - self._held),
                    total_tokens=self._world.target.kv_tokens,
                    lease=1,
                    draining=self.draining,
                    residency=[Residency(session=name, cached=count) for name, count in self._cached.items()],
                )
            )
            yield self._world.env.timeout(HEARTBEAT_MS)

    def work(self) -> Process:
        """Run steps for ever: the next batch, if there is one, and a token of each run."""
        world = self._world
        while True:
            if not self._batches and not self._runs:
                self._wake = world.env.event()
                yield self._wake
                continue
            jobs = self._batches[0].jobs if self._batches else []
            batch_id = self._batches.popleft().batch if self._batches else "run"
            for job in jobs:
                # A round for a session in a run halts it: its last tokens come first.
                if (run := self._runs.pop(job.session, None)) is not None and run.tokens:
                    self._report(run, left=0)
            stepping = list(self._runs.values())
            parts: list[tuple[int, int, int]] = []
            for run in stepping:
                length = run.base_len + run.tokens + 1
                held = min(self._cached.get(run.session.state.session_id, 0), length - 1)
                parts.append((length - held, length, 1))
                self._keep(run.session.state.session_id, length)
            for job in jobs:
                length = job.prefill_to if job.prefill_to is not None else job.base_len + len(job.draft)
                held = min(self._cached.get(job.session, 0), job.base_len - 1)
                parts.append((max(0, length - held), length, 0 if job.prefill_to is not None else len(job.draft) + 1))
                self._keep(job.session, max(held, length))
            shape = cost.shape_of(parts)
            took_ms = world.target.time_ms(shape) / self._speed
            yield world.env.timeout(took_ms)
            world.batches.append(Measurement(shape=shape, measured_ms=took_ms))
            for job, (new, _, _) in zip(jobs, parts[len(stepping) :], strict=True):
                self._judge(job, batch_id, new, took_ms)
            self._advance([run for run in stepping if self._runs.get(run.session.state.session_id) is run], took_ms)

    def _judge(self, job: Job, batch_id: str, new: int, took_ms: float) -> None:
        """Publish a job's result: the accepted draft tokens and the target's own next one, or a chunk of prefill."""
        world = self._world
        session = world.session(job.session)
        if session is None:
            self.release(job.session)
        if session is None or (job.prefill_to is None and job.base_len != session.length):
            world.settle_stale(job, batch_id, self.verifier_id)
            return
        accepted, tokens, finish, run_left = 0, [], None, 0
        if job.prefill_to is None:
            generate = session.served.generate
            room = len(generate.prompt) + generate.max_tokens - job.base_len
            verdict = accept(job.draft, [RIGHT] * (len(job.draft) + 1), room, frozenset())
            accepted, tokens = verdict.accepted, verdict.tokens
            session.length = job.base_len + len(tokens)
            finish = finish_of(generate, session.length)
            self._keep(job.session, job.base_len + accepted)
            if job.run is not None and finish is None:
                run_left = job.run.tokens
                self._runs[job.session] = _SimulatedRun(
                    session, job.round + 1, session.length, run_left, world.now_ms + job.run.ms, world.now_ms
                )
        result = Result(
            session=job.session,
            round=job.round,
            base_len=job.base_len,
            status=Status.COMMITTED if job.prefill_to is None else Status.PREFILLED,
            verifier=self.verifier_id,
            batch=batch_id,
            accepted=accepted,
            tokens=tokens,
            run_left=run_left,
            drafted=job.drafted,
            trimmed_to=len(job.draft),
            finish=finish,
            cached=0 if finish is not None else self._cached.get(job.session, 0),
            new_tokens=new,
            queue_ms=job.queue_ms,
            verify_ms=took_ms,
        )
        if finish is not None:
            self.release(job.session)
        world.publish(session, result)

    def _advance(self, runs: Sequence[_SimulatedRun], took_ms: float) -> None:
        """Add the token of a step to each run; report those that are over, or all once a report is due.

        runs: without those that were given up during the step.
        """
        now_ms = self._world.now_ms
        over = set()
        for run in runs:
            session_id = run.session.state.session_id
            run.tokens += 1
            run.left -= 1
            run.verify_ms += took_ms
            ended = finish_of(run.session.served.generate, run.base_len + run.tokens) is not None
            if ended or run.left <= 0 or now_ms >= run.until_ms:
                del self._runs[session_id]
                over.add(session_id)
        due = any(now_ms - run.reported_ms >= REPORT_MS for run in runs)
        for run in runs:
            if run.session.state.session_id in over:
                self._report(run, left=0)
            elif due:
                self._report(run, left=run.left)

    def _report(self, run: _SimulatedRun, left: int) -> None:
        session = run.session
        session_id = session.state.session_id
        session.length = run.base_len + run.tokens
        finish = finish_of(session.served.generate, session.length)
        result = Result(
            session=session_id,
            round=run.round,
            base_len=run.base_len,
            status=Status.COMMITTED,
            verifier=self.verifier_id,
            batch="run",
            tokens=[RIGHT] * run.tokens,
            run=True,
            run_left=left,
            finish=finish,
            cached=0 if finish is not None else self._cached.get(session_id, 0),
            new_tokens=run.tokens,
            verify_ms=run.verify_ms,
        )
        run.round, run.base_len = run.round + 1, session.length
        run.tokens, run.verify_ms, run.reported_ms = 0, 0.0, self._world.now_ms
        if finish is not None:
            self.release(session_id)
        self._world.publish(session, result)

    def _keep(self, session_id: str, tokens: int) -> None:
        """Hold a session's KV; evict the least recently used sessions when the memory is full."""
        self._held += tokens - self._cached.get(session_id, 0)
        self._cached[session_id] = tokens
        self._cached.move_to_end(session_id)
        while len(self._cached) > 1 and self._held > self._world.target.kv_tokens:
            _, dropped = self._cached.popitem(last=False)
            self._held -= dropped
