"""Continuous batching: the sessions and the number of tokens of each that a step of the engine computes.

It works as in modern engines. In every step, each running session whose prompt is computed decodes: one token, or a
draft and the token after it. Beside them up to `prefill_tokens` of prompts are computed, the oldest first, so that a
long prompt lengthens the other sessions' steps by a bounded time (Sarathi-Serve, arXiv 2403.02310). Pending sessions
start in order of arrival. One starts as soon as the KV of its whole prompt fits beside the next step of the running
sessions and one further block for each of them. When growth needs more memory than is free, drafts are dropped first.
Then the newest session is preempted: it gives up its KV, becomes the first pending session and is computed again
(vLLM's preemption by recomputation, arXiv 2309.06180). The oldest session therefore always makes progress, and none
starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class SequenceCache(Protocol):
    """The part of `shared.engine.Engine` that batching needs."""

    @property
    def free_tokens(self) -> int:
        """Number of tokens that fit without evicting a session."""

    def cached(self, session_id: str) -> int:
        """Return the number of a session's tokens in the cache."""

    def attach(self, session_id: str, tokens: Sequence[int]) -> int:
        """Attach a session; return the number of its tokens in the cache."""

    def release(self, session_id: str) -> None:
        """Release a session."""


@dataclass(eq=False)
class SequenceState:
    """A running or pending session."""

    session_id: str
    tokens: list[int]
    """Committed tokens, prompt first. The engine's loop appends to them."""
    limit: int
    """Most tokens of the session, prompt included. They fit the cache and the model's context."""


@dataclass(frozen=True)
class StepPart:
    """One session's part of a step."""

    sequence: SequenceState
    tokens: int
    """Committed tokens to compute; fewer if a prefix becomes shared within this step."""
    draft: int
    """Most draft tokens to verify after them."""
    prefill_to: int | None
    """Length after a chunk of a prompt; None where the next token is sampled."""


class Batcher:
    """The sessions of one engine, in order of arrival."""

    def __init__(
        self, cache: SequenceCache, *, block_tokens: int, prefill_tokens: int, max_running: int, draft_length: int = 0
    ) -> None:
        """`block_tokens` is the cache's block size, `draft_length` the longest draft of a session in one step."""
        self._cache = cache
        self._block_tokens = block_tokens
        self._prefill_tokens = prefill_tokens
        self._max_running = max_running
        self._draft_length = draft_length
        self._running: list[SequenceState] = []
        self._waiting: deque[SequenceState] = deque()

    @property
    def running(self) -> Sequence[SequenceState]:
        """Sessions with KV, the oldest first."""
        return self._running

    @property
    def waiting(self) -> Sequence[SequenceState]:
        """Pending sessions, the next one first."""
        return self._waiting

    def add(self, sequence: SequenceState) -> None:
        """Add a pending session."""
        self._waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Remove an ended or cancelled session; its KV is free at once."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._cache.release(sequence.session_id)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def next_step(self) -> list[StepPart]:
        """Return the next step: decodes first, then prompts. Empty only when there are no sessions."""
        for sequence in self._running:
            # A prompt continues with blocks that another session completed meanwhile.
            self._cache.attach(sequence.session_id, sequence.tokens)
        parts, reserved, preempted = self._decodes()
        budget = self._prefill_tokens
        for sequence in self._running:
            if self._pending(sequence) > 1:
                room = (
                    self._cache.free_tokens
                    - reserved * self._block_tokens
                    + -self._cache.cached(sequence.session_id) % self._block_tokens
                )
                if (count := min(self._pending(sequence), budget, room)) <= 0:
                    break
                parts.append(self._chunk(sequence, count))
                reserved += self._growth(sequence, self._cache.cached(sequence.session_id) + count)
                budget -= count
        while budget and self._waiting and not preempted and self._take_next():
            sequence = self._running[-1]
            count = min(self._pending(sequence), budget)
            parts.append(self._chunk(sequence, count))
            budget -= count
        return parts

    def _decodes(self) -> tuple[list[StepPart], int, bool]:
        """Return the decodes, the blocks that they need, and whether a session was preempted."""
        parts: list[StepPart] = []
        reserved, preempted = 0, False
        for sequence in tuple(self._running):
            if sequence not in self._running or self._pending(sequence) > 1:
                continue
            length = len(sequence.tokens)
            draft = self._lookahead(sequence)
            if self._growth(sequence, length + draft) > self._free - reserved:
                draft = 0
            while (need := self._growth(sequence, length + draft)) > self._free - reserved:
                preempted = True
                last = self._running.pop()
                self._cache.release(last.session_id)
                self._waiting.appendleft(last)
                if last is sequence:
                    break
            else:
                parts.append(StepPart(sequence, 1, draft, None))
                reserved += need
        return parts, reserved, preempted

    def _take_next(self) -> bool:
        """Start the first pending session if there is room for it."""
        sequence = self._waiting[0]
        if len(self._running) >= self._max_running:
            return False
        self._cache.attach(sequence.session_id, sequence.tokens)
        others = sum(1 + self._growth(other, len(other.tokens) + self._lookahead(other)) for other in self._running)
        if self._growth(sequence, len(sequence.tokens)) + others > self._free:
            self._cache.release(sequence.session_id)
            return False
        self._running.append(self._waiting.popleft())
        return True

    def _lookahead(self, sequence: SequenceState) -> int:
        """Return the longest draft that the session can use; the token after it takes the last position."""
        return max(0, min(self._draft_length, sequence.limit - len(sequence.tokens) - 1))

    def _chunk(self, sequence: SequenceState, count: int) -> StepPart:
        to = self._cache.cached(sequence.session_id) + count
        return StepPart(sequence, count, 0, None if to == len(sequence.tokens) else to)

    def _pending(self, sequence: SequenceState) -> int:
        """Return the number of committed tokens without KV: 1 for a decoding session."""
        return len(sequence.tokens) - self._cache.cached(sequence.session_id)

    def _growth(self, sequence: SequenceState, length: int) -> int:
        """Return the blocks that a session needs beside its own to hold `length` tokens."""
        return self._blocks(length) - self._blocks(self._cache.cached(sequence.session_id))

    def _blocks(self, length: int) -> int:
        return -(-length // self._block_tokens)

    @property
    def _free(self) -> int:
        return self._cache.free_tokens // self._block_tokens
