"""The pools of drafters, as heartbeats show them, and the sessions that a stand-in gives to a drafter.

A stand-in serves sessions without drafts while no drafter has room for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.messages import DRAFTER_BEAT_S, DrafterHeartbeat

SILENT_MS = 3000 * DRAFTER_BEAT_S
"""A drafter without a heartbeat for this long counts as gone."""
MOST_AT_ONCE = 8
"""Sessions given to a drafter after one of its heartbeats. It may ask the verifiers for the hidden states of each."""
MOST_MOVES = 3
"""Most times that a stand-in gives a session away. RabbitMQ drops a request that is returned too often."""
REMEMBERED = 10_000
"""Sessions whose moves are remembered."""


class DrafterPools:
    """The live drafters of each pool."""

    def __init__(self, pools: Sequence[str], now_ms: float) -> None:
        """pools: served by a stand-in if they have no drafter."""
        self._pools = pools
        self._seen_ms: dict[str, dict[str, float]] = {}
        """Time of the last heartbeat by pool and drafter."""
        self._known_ms = now_ms + SILENT_MS
        """From this time on, a drafter without a heartbeat counts as gone."""

    def on_heartbeat(self, heartbeat: DrafterHeartbeat, now_ms: float) -> None:
        """Note a drafter's heartbeat; ignore a stand-in's."""
        self._forget_silent(now_ms)
        if heartbeat.drafts:
            self._seen_ms.setdefault(heartbeat.pool, {})[heartbeat.drafter] = now_ms

    def on_pause(self, paused_ms: float) -> None:
        """Note that this process has not run, nor read heartbeats, for this time."""
        for drafters in self._seen_ms.values():
            for drafter in drafters:
                drafters[drafter] += paused_ms

    def without_drafters(self, now_ms: float) -> list[str]:
        """Return the pools that have no live drafter."""
        self._forget_silent(now_ms)
        return [pool for pool in self._pools if pool not in self._seen_ms] if now_ms >= self._known_ms else []

    @property
    def remembered(self) -> int:
        """Number of drafters whose heartbeats are remembered."""
        return sum(map(len, self._seen_ms.values()))

    def _forget_silent(self, now_ms: float) -> None:
        live = {
            pool: {name: at_ms for name, at_ms in drafters.items() if now_ms - at_ms <= SILENT_MS}
            for pool, drafters in self._seen_ms.items()
        }
        self._seen_ms = {pool: drafters for pool, drafters in live.items() if drafters}


class SessionMoves:
    """The choice of sessions that go from a stand-in to a drafter."""

    def __init__(self) -> None:
        self._moves: dict[str, int] = {}
        """Moves by session, the latest moved session last."""

    def choose(self, heartbeat: DrafterHeartbeat, session_ids: Sequence[str]) -> list[str]:
        """Return the sessions to give away after a drafter's heartbeat, of those that the stand-in serves.

        They are no more than the drafter has room for, and none has come back `MOST_MOVES` times.
        """
        if not heartbeat.drafts:
            return []
        room = min(MOST_AT_ONCE, max(0, heartbeat.max_sessions - heartbeat.sessions))
        chosen = [name for name in session_ids if self._moves.get(name, 0) < MOST_MOVES][:room]
        for name in chosen:
            self._moves[name] = self._moves.pop(name, 0) + 1
        while len(self._moves) > REMEMBERED:
            del self._moves[next(iter(self._moves))]
        return chosen
