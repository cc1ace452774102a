"""The order in which sessions are served. It tells a session that is still waiting for its turn from a stalled one.

A *turn* is progress of a session: new tokens, or a chunk of its prompt. A *wait* is the time from one turn of a session
to its next one; the first wait begins when the session is started. Drafters take requests, and verifiers take rounds,
about in order of arrival. So a session is waiting in a working queue while turns come to sessions

- whose wait began before its own, or
- that were started before it in the same pool of drafters, as long as it has had no turn itself: its request may be
  in the queue of a drafter that has no room. As long as the scheduler reports sessions that wait for room in the
  verifiers' KV caches, those of all pools count: the session may be one that waits, and a cache is for all pools.

When only later sessions get turns, the session has been passed over, and nobody works on it.

Sessions of other gateways count too. For a session without a turn, their starts and last turns are read from Redis now
and then. For a session that has had one, the backlog that the scheduler reported when the wait began replaces them.

Times are seconds on one monotonic clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

RESOLUTION_S = 0.1
"""Turns within this time count as one."""
OVERTAKING_S = 5.0
"""A round may go before rounds that arrived this much earlier: those with an SLO go first for a while, and drafting
takes longer for some."""
BACKLOG_FACTOR = 2.0
"""A reported backlog may take this many times as long as predicted."""


@dataclass
class Wait:
    """One session's wait for its next turn."""

    pool: str
    started_s: float
    """When the session was started."""
    since_s: float
    """When this wait began."""
    had_turn: bool = False
    paused_s: float = 0.0
    """Part of this wait in which this process did not run."""
    backlog_s: float = 0.0
    """The longest backlog reported at the beginning of this wait: work that goes before this session's."""


@dataclass
class _Turns:
    """The last turn of the sessions whose key is at most a given one. Both lists ascend: a turn is dropped when a
    session with a smaller key has a later one."""

    keys: list[float] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def add(self, key: float, time_s: float) -> None:
        if time_s - self.last(key) < RESOLUTION_S:
            return
        place = bisect_left(self.keys, key)
        end = max(place, bisect_right(self.times_s, time_s))
        self.keys[place:end] = [key]
        self.times_s[place:end] = [time_s]

    def last(self, key: float) -> float:
        """Return the time of the last turn of a session with at most this key; -inf if there was none."""
        place = bisect_right(self.keys, key)
        return self.times_s[place - 1] if place else -math.inf

    def forget(self, before_s: float) -> None:
        kept = bisect_right(self.times_s, before_s)
        del self.keys[:kept], self.times_s[:kept]


class TurnOrder:
    """The recent turns of one gateway's sessions, and the last ones of others'."""

    def __init__(self) -> None:
        self._by_wait = _Turns()
        self._by_start: dict[str, _Turns] = {}
        self._of_all_pools = _Turns()
        """By start, too."""
        self._room_awaited_s = -math.inf

    def record(self, wait: Wait, now_s: float) -> None:
        """Record the turn that ends a wait; the next one begins."""
        self._by_wait.add(wait.since_s, now_s)
        self._add_by_start(wait.pool, wait.started_s, now_s)
        wait.since_s, wait.had_turn, wait.paused_s, wait.backlog_s = now_s, True, 0.0, 0.0

    def record_elsewhere(self, pool: str, started_s: float, turn_s: float) -> None:
        """Record the last turn of another gateway's session."""
        self._add_by_start(pool, started_s, turn_s)

    def record_room_awaited(self, now_s: float) -> None:
        """Record a report that sessions wait for room in the verifiers' KV caches."""
        self._room_awaited_s = now_s

    def idle_s(self, wait: Wait, now_s: float) -> float:
        """Return how long neither the session nor one that goes before it has had a turn."""
        last_s = max(
            wait.since_s,
            wait.since_s + BACKLOG_FACTOR * wait.backlog_s,
            self._by_wait.last(wait.since_s + OVERTAKING_S),
        )
        if not wait.had_turn and wait.pool in self._by_start:
            last_s = max(last_s, self._by_start[wait.pool].last(wait.started_s))
        if not wait.had_turn:
            # Up to the last report: the session may have room since then, and its prompt takes a moment.
            last_s = max(last_s, min(self._of_all_pools.last(wait.started_s + OVERTAKING_S), self._room_awaited_s))
        return now_s - last_s - wait.paused_s

    def _add_by_start(self, pool: str, started_s: float, turn_s: float) -> None:
        self._by_start.setdefault(pool, _Turns()).add(started_s, turn_s)
        self._of_all_pools.add(started_s, turn_s)

    def forget(self, before_s: float) -> None:
        """Forget the turns before that time."""
        self._by_wait.forget(before_s)
        self._of_all_pools.forget(before_s)
        for turns in self._by_start.values():
            turns.forget(before_s)
        self._by_start = {pool: turns for pool, turns in self._by_start.items() if turns.times_s}
