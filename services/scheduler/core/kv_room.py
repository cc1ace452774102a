"""Room in the verifiers' KV caches: where a session may begin, and which of those that wait for room begins first.

A verifier whose cache is full evicts the KV of sessions whose drafts are still under way. Each of them is computed
again with its next round, which evicts another: with too many sessions a verifier computes little else. A session
therefore begins only where the KV of all sessions fits, and the others wait before their prompts are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.scheduler.core.pool import ActiveSession, PendingRound, VerifierState
from services.scheduler.core.round_queue import RoundQueue
from services.scheduler.core.verifier_runs import whole_blocks
from shared.kernels.layout import BLOCK

GROWTH = BLOCK
"""Tokens by which a session is expected to grow until others end and leave room."""
QUIET_MS = 5000.0
"""A session that is away for longer may lose its KV: its device may be gone."""
LATE_TURN = 4
"""Of so many sessions that begin, one is late already, if any is: no session waits for ever."""


class KvRoom:
    """Tokens of the verifiers' caches that their sessions leave, at one moment."""

    def __init__(self, queues: Mapping[str, RoundQueue], now_ms: float) -> None:
        """queues: by verifier."""
        self._queues = queues
        self._now_ms = now_ms
        self._taken: dict[str, int] = {}

    def fits(self, pending: PendingRound, verifier: VerifierState) -> bool:
        """Return whether a session may begin on a verifier. One without any session takes each."""
        taken = self._taken_on(verifier)
        return not taken or taken + _needed(pending.length_after) <= verifier.heartbeat.total_tokens

    def take(self, pending: PendingRound, verifier: VerifierState) -> None:
        """Count a session that begins on a verifier."""
        self._taken[verifier.verifier_id] = self._taken_on(verifier) + _needed(pending.length_after)

    def _taken_on(self, verifier: VerifierState) -> int:
        verifier_id = verifier.verifier_id
        if verifier_id not in self._taken:
            self._taken[verifier_id] = sum(
                _needed(session.length)
                for session_id, session in verifier.sessions.items()
                if self._counts(session_id, session, verifier)
            )
        return self._taken[verifier_id]

    def _counts(self, session_id: str, session: ActiveSession, verifier: VerifierState) -> bool:
        return (
            self._now_ms - session.seen_ms <= QUIET_MS
            or session_id in self._queues[verifier.verifier_id].rounds
            or session_id in verifier.runs
            or any(session_id in flight.jobs for flight in verifier.in_flight)
        )


def begin_order(
    waiting: Iterable[PendingRound], now_ms: float, max_wait_ms: float, *, late_first: bool
) -> list[PendingRound]:
    """Return the rounds that wait for room in the order in which their sessions should begin.

    First those that have begun before and lost their verifier, then by deadline. Sessions that are late already come
    last, in order of arrival, since they would only make others late; with `late_first` one of them comes before those
    that are in time.
    max_wait_ms: see `PendingRound.deadline_ms`.
    """
    begun, timely, late = [], [], []
    for pending in waiting:
        is_late = pending.due_ms is not None and pending.due_ms < now_ms
        (begun if pending.verify.round > 0 else late if is_late else timely).append(pending)
    timely.sort(key=lambda pending: (pending.deadline_ms(max_wait_ms), pending.session_id))
    for line in (begun, late):
        line.sort(key=lambda pending: (pending.arrived_ms, pending.session_id))
    turn, late = (late[:1], late[1:]) if late_first else ([], late)
    return [*begun, *turn, *timely, *late]


def _needed(length: int) -> int:
    return whole_blocks(length + GROWTH)
