"""A verifier in virtual time, for recorded traffic: its cache, its runs, and the time that its steps take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shared import cost
from shared.messages import CostModel, Heartbeat, Job


class StepCopies(NamedTuple):
    """Tokens that a run copies in a step, and those that the step verifies for that."""

    accepted: int = 0
    verified: int = 0


NO_COPIES = StepCopies()


class VirtualVerifier:
    """A verifier's cache, the time at which it is free, and its runs."""

    def __init__(self, heartbeat: Heartbeat, until_ms: float, model: CostModel, slowness: float) -> None:
        self.heartbeat = heartbeat
        self.until_ms = until_ms
        """The last recorded heartbeat, after which the verifier is gone; infinite if it stayed."""
        self.free_ms = 0.0
        self.cached: OrderedDict[str, int] = OrderedDict()
        self.runs: dict[str, int] = {}
        """Tokens that sessions in runs may still get."""
        self.most_copied: dict[str, int] = {}
        """Most tokens that a step may copy for each of them."""
        self._model = model
        self._slowness = slowness

    def current_heartbeat(self) -> Heartbeat:
        """Return the recorded heartbeat with this run's cache."""
        residency = [{"session": session_id, "cached": tokens} for session_id, tokens in self.cached.items()]
        free = max(0, self.heartbeat.total_tokens - sum(self.cached.values()))
        fields = {**self.heartbeat.model_dump(), "residency": residency, "free_tokens": free}
        return Heartbeat.model_validate(fields)

    def holds(self, session_id: str) -> int:
        """Return a session's tokens in the cache."""
        return self.cached.get(session_id, 0)

    def keep(self, session_id: str, tokens: int) -> None:
        """Hold a session's KV; evict the least recently used sessions when the cache is full."""
        self.cached[session_id] = tokens
        self.cached.move_to_end(session_id)
        while len(self.cached) > 1 and sum(self.cached.values()) > self.heartbeat.total_tokens:
            self.cached.popitem(last=False)

    def compute(self, jobs: Sequence[Job], in_runs: Mapping[str, StepCopies]) -> tuple[list[int], float]:
        """Take a batch and the tokens of runs into the cache; return each job's new tokens, and the time in ms."""
        shape = cost.EMPTY
        new_tokens = []
        for session_id, copies in in_runs.items():
            held, rows = self.holds(session_id), 1 + copies.verified
            shape = cost.grow(shape, rows, held + rows, rows)
            self.keep(session_id, held + 1 + copies.accepted)
        for job in jobs:
            held = min(self.holds(job.session), job.base_len - 1)
            chunk = job.prefill_to is not None
            length = job.prefill_to if job.prefill_to is not None else job.base_len + len(job.draft)
            new_tokens.append(max(0, length - held))
            shape = cost.grow(shape, new_tokens[-1], length, 0 if chunk else len(job.draft) + 1)
            self.keep(job.session, max(held, length))
        return new_tokens, cost.predict_ms(self._model, shape) * self._slowness
