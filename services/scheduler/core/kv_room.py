"""Room in the verifiers' KV caches: whether a session may begin. `waiting` has those that wait.

A verifier whose cache is full evicts the KV of sessions whose drafts are still under way. Each of them is computed
again with its next round, which evicts another: with too many sessions a verifier computes little else. A session
therefore begins only where the KV of all sessions fits, and the others wait before their prompts are computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from services.scheduler.core.pool import ActiveSession, PendingRound, UnknownSession, VerifierState
from services.scheduler.core.round_queue import RoundQueue
from services.scheduler.core.verifier_runs import whole_blocks
from shared.kernels.layout import BLOCK
from shared.messages import Heartbeat

GROWTH = BLOCK
"""Tokens by which a session is expected to grow until others end and leave room."""
QUIET_MS = 5000.0
"""A session that is away for longer may lose its KV: its device may be gone."""
RECOUNT_MS = 100.0
"""Sessions grow and become quiet; how much they take is counted anew after this time at the latest."""
LATE_TURN = 4
"""Of so many sessions that begin, one is late already, if any is: no session waits for ever."""
LONGEST_PAUSE_MS = 10_000.0
"""A session that has begun and lost its verifier goes on after this time, even if others lose their KV by it: its user
waits in the middle of a text, and its gateway takes it for stalled after a minute (`WISP_STALL_TIMEOUT_S`)."""


class KvRoom:
    """Tokens of the verifiers' caches that their sessions take."""

    def __init__(self, queues: Mapping[str, RoundQueue]) -> None:
        """queues: by verifier."""
        self._queues = queues
        self._counts: dict[str, _Count] = {}

    def fits(self, pending: PendingRound, verifier: VerifierState, now_ms: float) -> bool:
        """Return whether a session may begin on a verifier. One without any session takes each that its cache holds."""
        count = self._counts.setdefault(verifier.verifier_id, _Count())
        if now_ms - count.counted_ms > RECOUNT_MS:
            count.tokens_of = {
                session_id: _taken(session_id, session.length, verifier)
                for session_id, session in verifier.sessions.items()
                if self._is_near(session_id, session, verifier, now_ms)
            }
            for session_id, unknown in verifier.unknown_sessions.items():
                if now_ms - unknown.seen_ms <= QUIET_MS or session_id in verifier.runs:
                    count.tokens_of.setdefault(session_id, _taken(session_id, unknown.cached, verifier))
            count.total, count.counted_ms = sum(count.tokens_of.values()), now_ms
        needed = pending.length_after if not count.total else count.total + _needed(pending.length_after)
        return needed <= verifier.heartbeat.total_tokens

    def add(self, session_id: str, session: ActiveSession, verifier: VerifierState) -> None:
        """Count a session that begins on a verifier."""
        count = self._counts.setdefault(verifier.verifier_id, _Count())
        tokens = _taken(session_id, session.length, verifier)
        count.total += tokens - count.tokens_of.get(session_id, 0)
        count.tokens_of[session_id] = tokens

    def remove(self, session_id: str, verifier_id: str) -> None:
        """Count a session no longer that has left a verifier."""
        if (count := self._counts.get(verifier_id)) is not None:
            count.total -= count.tokens_of.pop(session_id, 0)

    def drop(self, verifier_id: str) -> None:
        """Forget a verifier that is gone."""
        self._counts.pop(verifier_id, None)

    def _is_near(self, session_id: str, session: ActiveSession, verifier: VerifierState, now_ms: float) -> bool:
        """Return whether a session keeps its room: it was seen lately, or the verifier works on it."""
        return (
            now_ms - session.seen_ms <= QUIET_MS
            or session_id in self._queues[verifier.verifier_id].rounds
            or session_id in verifier.runs
            or any(session_id in flight.jobs for flight in verifier.in_flight)
        )


@dataclass
class _Count:
    """Tokens that the sessions of one verifier take."""

    tokens_of: dict[str, int] = field(default_factory=dict)
    """By session."""
    total: int = 0
    counted_ms: float = -math.inf


def spared(heartbeat: Heartbeat) -> dict[str, int]:
    """Return, by session, the tokens of the cache that sharing saves. A session without an entry saves none.

    A verifier counts shared KV once. What it has in use is therefore less than the sum of its sessions; each session
    gets its part of the difference, by its length.
    """
    held = sum(one.cached for one in heartbeat.residency)
    shared = min(held, held - (heartbeat.total_tokens - heartbeat.free_tokens))
    return {one.session: one.cached * shared // held for one in heartbeat.residency} if shared > 0 else {}


def unknown_sessions(
    heartbeat: Heartbeat, known: Collection[str], before: Mapping[str, UnknownSession] | None, now_ms: float
) -> dict[str, UnknownSession]:
    """Return the sessions of a heartbeat that this scheduler does not know: those of one that has stopped, say.

    A verifier has worked on a session whose KV has changed since the last heartbeat. In the first heartbeat it may have
    worked on each. KV that appears later and does not change is no sign of work: its session may just have ended.
    before: those of the last heartbeat; None if this is the verifier's first.
    """
    found = {}
    for held in heartbeat.residency:
        if held.session in known:
            continue
        if before is None:
            seen_ms = now_ms
        elif (last := before.get(held.session)) is None:
            seen_ms = -math.inf
        else:
            seen_ms = last.seen_ms if last.cached == held.cached else now_ms
        found[held.session] = UnknownSession(held.cached, seen_ms)
    return found


def has_paused(pending: PendingRound, now_ms: float) -> bool:
    """Return whether a round's session has begun before, and has waited for so long that it goes on without room."""
    return pending.verify.round > 0 and now_ms - pending.arrived_ms >= LONGEST_PAUSE_MS


def _taken(session_id: str, length: int, verifier: VerifierState) -> int:
    return _needed(length) - verifier.spared.get(session_id, 0)


def _needed(length: int) -> int:
    return whole_blocks(length + GROWTH)
