"""The engine's own loop: sessions in, one step after the other, what each step brought out. Runs in one thread.

Steps are run by the verifier's code, so texts are chosen and accepted in the same way as in the suite.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.baseline.core.batching import Batcher, Part, Seat
from services.baseline.drafts import InProcessDrafts, Wish
from services.drafter.drafting import Drafting
from services.verifier.core import replies
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine
from shared.messages import Failure, Generate, Result, Status


@dataclass
class _Session:
    """A session from its arrival to its end."""

    generate: Generate
    seat: Seat
    stop_ids: frozenset[int]
    came_s: float
    queue_ms: float | None = None
    """How long it waited for its first step."""
    round: int = 0


class EngineLoop:
    """An engine and its sessions. Not thread-safe."""

    def __init__(
        self, engine: Engine, name: str, drafting: Drafting | None, *, prefill_tokens: int, max_running: int
    ) -> None:
        """name: of this engine in its results. drafting: None decodes plainly."""
        self._engine = engine
        self._name = name
        self._drafts = None if drafting is None else InProcessDrafts(drafting, engine)
        self._batcher = Batcher(
            engine,
            prefill_tokens=prefill_tokens,
            max_running=max_running,
            draft_length=0 if self._drafts is None else self._drafts.longest,
        )
        self._sessions: dict[str, _Session] = {}
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self._sessions)

    @property
    def longest_session(self) -> int:
        """Most tokens of a session, prompt included."""
        return min(self._engine.max_len, self._engine.budget_tokens)

    def add(self, generate: Generate) -> Result | None:
        """A session comes; it waits for its turn. The result says why it cannot be served, None if it can."""
        limit = len(generate.prompt) + generate.max_tokens
        if limit > self.longest_session:
            text = f"the session may come to {limit} tokens, and at most {self.longest_session} fit here"
            return self._failed(generate.session, 0, limit, Failure(code="context_length_exceeded", message=text))
        seat = Seat(generate.session, list(generate.prompt), limit)
        self._sessions[generate.session] = _Session(generate, seat, frozenset(generate.stop_ids), time.perf_counter())
        self._batcher.add(seat)
        if self._drafts is not None:
            self._drafts.open(generate)
        return None

    def remove(self, session: str) -> None:
        """A session has ended, or nobody waits for it any more; nothing happens if it is not known."""
        if (known := self._sessions.pop(session, None)) is None:
            return
        self._batcher.remove(known.seat)
        if self._drafts is not None:
            self._drafts.close(session)

    def step(self) -> list[Result]:
        """Compute the next step; the results of the sessions that got tokens, or came to their end."""
        parts = self._batcher.next_step()
        if not parts:
            return []
        started_s = time.perf_counter()
        for part in parts:
            session = self._sessions[part.seat.session]
            if session.queue_ms is None:
                session.queue_ms = (started_s - session.came_s) * 1000
        drafts = self._propose(parts)
        drafted_s = time.perf_counter()
        tasks = [self._task(part, drafts.get(part.seat.session, [])) for part in parts]
        outcomes, shapes = verify(self._engine, tasks)
        verify_ms = (time.perf_counter() - drafted_s) * 1000
        self._steps += 1
        if self._drafts is not None and len(shapes) == 1 and all(part.tokens == 1 for part in parts):
            self._drafts.learn_step(len(parts), sum(map(len, drafts.values())), verify_ms)
        results = []
        for part, task, outcome in zip(parts, tasks, outcomes, strict=True):
            if (result := self._settle(part, task, outcome, (drafted_s - started_s) * 1000, verify_ms)) is not None:
                results.append(result)
        return results

    def _propose(self, parts: Sequence[Part]) -> dict[str, list[int]]:
        if self._drafts is None:
            return {}
        decodes = [part for part in parts if part.tokens == 1 and part.prefill_to is None]
        return self._drafts.propose([Wish(part.seat.session, part.seat.tokens, part.draft) for part in decodes])

    def _task(self, part: Part, draft: list[int]) -> VerifyTask:
        session = self._sessions[part.seat.session]
        return VerifyTask(
            session_id=part.seat.session,
            tokens=part.seat.tokens,
            draft=draft,
            sampling=session.generate.sampling,
            stop_ids=session.stop_ids,
            room=part.seat.limit - len(part.seat.tokens),
            prefill_to=part.prefill_to,
        )

    def _settle(
        self, part: Part, task: VerifyTask, outcome: VerifyOutcome, draft_ms: float, verify_ms: float
    ) -> Result | None:
        session = self._sessions[part.seat.session]
        base_len = len(part.seat.tokens)
        if outcome.error is not None:
            self.remove(part.seat.session)
            return self._failed(part.seat.session, session.round, base_len, replies.refused(outcome.error))
        if (verdict := outcome.verdict) is None:
            return None
        result = Result(
            session=part.seat.session,
            round=session.round,
            base_len=base_len,
            status=Status.COMMITTED,
            verifier=self._name,
            batch=self._batch,
            accepted=verdict.accepted,
            tokens=verdict.tokens,
            drafted=len(task.draft),
            trimmed_to=outcome.verified,
            finish=verdict.finish,
            cached=outcome.cached,
            new_tokens=outcome.new_tokens,
            draft_ms=draft_ms if part.draft else 0.0,
            queue_ms=session.queue_ms or 0.0,
            verify_ms=verify_ms,
        )
        session.queue_ms = 0.0
        session.round += 1
        part.seat.tokens += verdict.tokens
        if self._drafts is not None:
            self._drafts.settle(result)
        if verdict.finish is not None:
            self.remove(part.seat.session)
        return result

    @property
    def _batch(self) -> str:
        return f"{self._name}-{self._steps}"

    def _failed(self, session: str, round_: int, base_len: int, failure: Failure) -> Result:
        return Result(
            session=session,
            round=round_,
            base_len=base_len,
            status=Status.FAILED,
            verifier=self._name,
            batch=self._batch,
            error=failure,
        )
