"""Continuous batching: which sessions a step of the engine computes, and how many tokens of each. Pure.

As modern engines do it. Every step, each running session whose prompt is computed decodes: one token, or a draft and
the token after it. Beside them up to `prefill_tokens` of prompts are computed, the oldest first, so that a long prompt
stretches the others' steps by a bounded time (Sarathi-Serve, arXiv 2403.02310). Waiting sessions are taken in the order
in which they came, as soon as the K/V of their whole prompt fit beside all that is promised to those that run, and a
block for the growth of each of these. When growth needs more than there is, drafts are left out first; then the
session that came last gives its K/V up and waits again, first in the queue, and is computed anew (vLLM's preemption by
recomputation, arXiv 2309.06180). So the oldest session always goes on, and none starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.engine.blocks import BLOCK, blocks_for


class Cache(Protocol):
    """What is needed of `shared.engine.Engine`; see there."""

    @property
    def free_tokens(self) -> int:
        """Room that can be had without evicting a session."""

    def cached(self, session: str) -> int:
        """Tokens held."""

    def attach(self, session: str, tokens: Sequence[int]) -> int:
        """Make a session known; returns how many of its tokens are held."""

    def release(self, session: str) -> None:
        """Forget a session."""


@dataclass(eq=False)
class Seat:
    """A session that runs or waits."""

    session: str
    tokens: list[int]
    """The committed ones, prompt first; whoever owns the seat appends to them."""
    limit: int
    """Most tokens that it may come to, prompt included: no more than the cache and the model's context hold."""


@dataclass(frozen=True)
class Part:
    """What a step computes of one session."""

    seat: Seat
    tokens: int
    """Committed tokens that are computed; fewer if a beginning has become shared within this very step."""
    draft: int
    """Most draft tokens that may be verified after them."""
    prefill_to: int | None
    """For a chunk of a prompt, the length to which it is computed; None where the next token is chosen."""


class Batcher:
    """The sessions of one engine, in the order in which they came."""

    def __init__(self, cache: Cache, *, prefill_tokens: int, max_running: int, draft_length: int = 0) -> None:
        """draft_length: longest draft of a session in one step."""
        self._cache = cache
        self._prefill_tokens = prefill_tokens
        self._max_running = max_running
        self._draft_length = draft_length
        self._running: list[Seat] = []
        self._waiting: deque[Seat] = deque()

    @property
    def running(self) -> Sequence[Seat]:
        """Sessions that hold K/V, the oldest first."""
        return self._running

    @property
    def waiting(self) -> Sequence[Seat]:
        """Sessions that wait for room, the next one first."""
        return self._waiting

    def add(self, seat: Seat) -> None:
        """A session has come."""
        self._waiting.append(seat)

    def remove(self, seat: Seat) -> None:
        """A session has ended, or nobody waits for it any more: its K/V are free at once."""
        if seat in self._running:
            self._running.remove(seat)
            self._cache.release(seat.session)
        elif seat in self._waiting:
            self._waiting.remove(seat)

    def next_step(self) -> list[Part]:
        """What to compute next: decodes first, then prompts. Empty only when there are no sessions."""
        for seat in self._running:
            # A prompt goes on with blocks that another session has completed meanwhile.
            self._cache.attach(seat.session, seat.tokens)
        parts, reserved, preempted = self._decodes()
        budget = self._prefill_tokens
        for seat in self._running:
            if self._pending(seat) > 1:
                room = self._cache.free_tokens - reserved * BLOCK + -self._cache.cached(seat.session) % BLOCK
                if (count := min(self._pending(seat), budget, room)) <= 0:
                    break
                parts.append(self._chunk(seat, count))
                reserved += self._growth(seat, self._cache.cached(seat.session) + count)
                budget -= count
        while budget and self._waiting and not preempted and self._take_next():
            seat = self._running[-1]
            count = min(self._pending(seat), budget)
            parts.append(self._chunk(seat, count))
            budget -= count
        return parts

    def _decodes(self) -> tuple[list[Part], int, bool]:
        """The decodes, the blocks that they need, and whether some session had to give its own up."""
        parts: list[Part] = []
        reserved, preempted = 0, False
        for seat in tuple(self._running):
            if seat not in self._running or self._pending(seat) > 1:
                continue
            length = len(seat.tokens)
            draft = self._lookahead(seat)
            if self._growth(seat, length + draft) > self._free - reserved:
                draft = 0
            while (need := self._growth(seat, length + draft)) > self._free - reserved:
                preempted = True
                last = self._running.pop()
                self._cache.release(last.session)
                self._waiting.appendleft(last)
                if last is seat:
                    break
            else:
                parts.append(Part(seat, 1, draft, None))
                reserved += need
        return parts, reserved, preempted

    def _take_next(self) -> bool:
        """Let the first of those that wait run, if there is room for it."""
        seat = self._waiting[0]
        if len(self._running) >= self._max_running:
            return False
        self._cache.attach(seat.session, seat.tokens)
        others = sum(1 + self._growth(other, len(other.tokens) + self._lookahead(other)) for other in self._running)
        if self._growth(seat, len(seat.tokens)) + others > self._free:
            self._cache.release(seat.session)
            return False
        self._running.append(self._waiting.popleft())
        return True

    def _lookahead(self, seat: Seat) -> int:
        """The longest draft that the session may use: the token after it takes the last place."""
        return max(0, min(self._draft_length, seat.limit - len(seat.tokens) - 1))

    def _chunk(self, seat: Seat, count: int) -> Part:
        to = self._cache.cached(seat.session) + count
        return Part(seat, count, 0, None if to == len(seat.tokens) else to)

    def _pending(self, seat: Seat) -> int:
        """Committed tokens without K/V: the last one of a session that decodes."""
        return len(seat.tokens) - self._cache.cached(seat.session)

    def _growth(self, seat: Seat, length: int) -> int:
        """Blocks that a session needs beside its own to hold so many tokens."""
        return blocks_for(length) - blocks_for(self._cache.cached(seat.session))

    @property
    def _free(self) -> int:
        return self._cache.free_tokens // BLOCK
