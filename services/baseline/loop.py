"""The engine's loop: sessions in, one step after the other, results out. Runs in one thread.

The verifier's code computes the steps, so tokens are sampled and accepted as in the suite.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.baseline.core.batching import Batcher, SequenceState, StepPart
from services.baseline.drafts import DraftSlot, InProcessDrafts
from services.drafter.drafting import Drafting
from services.verifier.core import replies
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.grammar.masks import Grammars
from shared.kernels.layout import BLOCK
from shared.messages import Failure, Generate, Result, Status
from shared.messages.logprobs import as_text

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine


@dataclass
class _EngineSession:
    """A session from its arrival to its end."""

    generate: Generate
    sequence: SequenceState
    stop_ids: frozenset[int]
    arrived_s: float
    queue_ms: float | None = None
    """Time before its first step; 0 once it is reported."""
    round: int = 0


class EngineLoop:
    """An engine and its sessions. Not thread-safe."""

    def __init__(
        self,
        engine: TargetEngine,
        name: str,
        drafting: Drafting | None,
        *,
        grammars: Grammars | None,
        prefill_tokens: int,
        max_running: int,
    ) -> None:
        """`name` is the verifier's name in this engine's results. Without `drafting`, sessions decode plainly."""
        self._engine = engine
        self._name = name
        self._grammars = grammars
        self._drafts = None if drafting is None else InProcessDrafts(drafting, engine)
        self._batcher = Batcher(
            engine,
            block_tokens=BLOCK,
            prefill_tokens=prefill_tokens,
            max_running=max_running,
            draft_length=0 if self._drafts is None else self._drafts.longest,
        )
        self._sessions: dict[str, _EngineSession] = {}
        self._steps = 0

    @property
    def busy(self) -> bool:
        """True if there is something to compute."""
        return bool(self._sessions)

    @property
    def longest_session(self) -> int:
        """Most tokens of a session, prompt included."""
        return min(self._engine.max_len, self._engine.budget_tokens)

    def add(self, generate: Generate) -> Result | None:
        """Add a pending session; return a failed result if it cannot be served."""
        limit = len(generate.prompt) + generate.max_tokens
        if limit > self.longest_session:
            text = f"the session may grow to {limit} tokens, and at most {self.longest_session} fit here"
            return self._failed(generate.session, 0, limit, Failure(code="context_length_exceeded", message=text))
        sequence = SequenceState(generate.session, list(generate.prompt), limit)
        self._sessions[generate.session] = _EngineSession(
            generate, sequence, frozenset(generate.stop_ids), time.perf_counter()
        )
        self._batcher.add(sequence)
        if self._drafts is not None:
            self._drafts.open(generate)
        return None

    def remove(self, session_id: str) -> None:
        """Remove an ended or cancelled session; nothing happens if it is unknown."""
        if (session := self._sessions.pop(session_id, None)) is None:
            return
        self._batcher.remove(session.sequence)
        if self._grammars is not None:
            self._grammars.forget(session_id)
        if self._drafts is not None:
            self._drafts.close(session_id)

    def step(self) -> list[Result]:
        """Compute the next step; return the results of sessions with new tokens and of failed sessions."""
        parts = self._batcher.next_step()
        if not parts:
            return []
        started_s = time.perf_counter()
        for part in parts:
            session = self._sessions[part.sequence.session_id]
            if session.queue_ms is None:
                session.queue_ms = (started_s - session.arrived_s) * 1000
        drafts = self._propose(parts)
        drafted_s = time.perf_counter()
        tasks = [self._task(part, drafts.get(part.sequence.session_id, [])) for part in parts]
        outcomes, shapes = verify(self._engine, tasks, grammars=self._grammars)
        verify_ms = (time.perf_counter() - drafted_s) * 1000
        self._steps += 1
        if self._drafts is not None and len(shapes) == 1 and all(part.tokens == 1 for part in parts):
            self._drafts.learn_step(len(parts), sum(map(len, drafts.values())), verify_ms)
        results = []
        for part, task, outcome in zip(parts, tasks, outcomes, strict=True):
            if (result := self._settle(part, task, outcome, (drafted_s - started_s) * 1000, verify_ms)) is not None:
                results.append(result)
        return results

    def _propose(self, parts: Sequence[StepPart]) -> dict[str, list[int]]:
        if self._drafts is None:
            return {}
        decodes = [part for part in parts if part.tokens == 1 and part.prefill_to is None]
        return self._drafts.propose(
            [DraftSlot(part.sequence.session_id, part.sequence.tokens, part.draft) for part in decodes]
        )

    def _task(self, part: StepPart, draft: list[int]) -> VerifyTask:
        session = self._sessions[part.sequence.session_id]
        return VerifyTask(
            session_id=part.sequence.session_id,
            tokens=part.sequence.tokens,
            draft=draft,
            sampling=session.generate.sampling,
            stop_ids=session.stop_ids,
            room=part.sequence.limit - len(part.sequence.tokens),
            prompt_len=len(session.generate.prompt),
            prefill_to=part.prefill_to,
        )

    def _settle(
        self, part: StepPart, task: VerifyTask, outcome: VerifyOutcome, draft_ms: float, verify_ms: float
    ) -> Result | None:
        session = self._sessions[part.sequence.session_id]
        base_len = len(part.sequence.tokens)
        if outcome.error is not None:
            self.remove(part.sequence.session_id)
            return self._failed(part.sequence.session_id, session.round, base_len, replies.refused(outcome.error))
        if (verdict := outcome.verdict) is None:
            return None
        result = Result(
            session=part.sequence.session_id,
            round=session.round,
            base_len=base_len,
            status=Status.COMMITTED,
            verifier=self._name,
            batch=self._batch_id,
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
            arithmetic=self._engine.arithmetic,
            committed_in=[self._engine.arithmetic],
            logprobs=as_text(outcome.logprobs),
            logprobs_from=outcome.logprobs_from,
        )
        session.queue_ms = 0.0
        session.round += 1
        part.sequence.tokens += verdict.tokens
        if self._drafts is not None:
            self._drafts.settle(result)
        if verdict.finish is not None:
            self.remove(part.sequence.session_id)
        return result

    @property
    def _batch_id(self) -> str:
        return f"{self._name}-{self._steps}"

    def _failed(self, session_id: str, round_: int, base_len: int, failure: Failure) -> Result:
        return Result(
            session=session_id,
            round=round_,
            base_len=base_len,
            status=Status.FAILED,
            verifier=self._name,
            batch=self._batch_id,
            error=failure,
        )
