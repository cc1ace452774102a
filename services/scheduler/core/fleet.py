"""The verifiers, the active sessions, and the queue in which each round waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from services.scheduler.core import placement
from services.scheduler.core.kv_room import LATE_TURN, KvRoom, has_paused, spared, unknown_sessions
from services.scheduler.core.pool import ActiveSession, PendingRound, VerifierState
from services.scheduler.core.round_queue import RoundQueue, queued_round
from services.scheduler.core.waiting import Kind, WaitingSessions, kind_of
from shared import cost
from shared.messages import CostModel, Heartbeat

CHANGED = 1.25
"""A verifier's queue is sorted anew when its predicted times have changed by this factor."""
REMEMBERED = 1000
"""Cost models that are remembered: a verifier that was away is predicted by its own again."""
MOST_TRIED = 16
"""Waiting sessions of a model that are tried at once: there may be thousands, all too long for the room there is."""


class VerifierFleet:
    """All verifiers and pending rounds.

    Every pending round is in exactly one place: in the queue of a verifier, unplaced while no verifier may take it, or
    waiting while no verifier has room for its session's KV.
    """

    def __init__(self, max_wait_ms: float, *, migrate: bool, mix: bool, hold_back: bool = False) -> None:
        """max_wait_ms: see `PendingRound.deadline_ms`. migrate: sessions may leave the verifier that holds their KV.
        mix: a session may continue in another arithmetic if no verifier has its own. hold_back: sessions wait for room
        in a verifier's cache before they begin."""
        self.verifiers: dict[str, VerifierState] = {}
        self.queues: dict[str, RoundQueue] = {}
        self.unplaced: dict[str, PendingRound] = {}
        self.waiting = WaitingSessions(max_wait_ms)
        """First rounds of sessions that wait for room in a verifier's cache."""
        self.sessions: dict[str, ActiveSession] = {}
        self.prompt_rate = 0.0
        """Prompt tokens per millisecond that the verifiers have computed lately."""
        self._max_wait_ms = max_wait_ms
        self._migrate = migrate
        self._mix = mix
        self._hold_back = hold_back
        self._room = KvRoom(self.queues)
        self._began = 0
        self._may_have_room = False
        self._models: dict[str, CostModel] = {}
        self._sorted_by: dict[str, CostModel] = {}

    @property
    def pending_count(self) -> int:
        """Number of pending rounds."""
        return len(self.unplaced) + len(self.waiting) + sum(len(queue) for queue in self.queues.values())

    def pending_rounds(self) -> Iterator[PendingRound]:
        """Iterate over the pending rounds."""
        yield from chain(self.unplaced.values(), self.waiting.values())
        for queue in self.queues.values():
            for queued in queue.rounds.values():
                yield queued.pending

    def pending_round(self, session_id: str) -> PendingRound | None:
        """Return the session's pending round; None if it has none."""
        if (pending := self.unplaced.get(session_id) or self.waiting.get(session_id)) is not None:
            return pending
        for queue in self.queues.values():
            if (queued := queue.rounds.get(session_id)) is not None:
                return queued.pending
        return None

    def add(self, pending: PendingRound, now_ms: float) -> None:
        """Queue a round at the verifier that suits it best; let its session wait if it begins and none has room."""
        begins = self._hold_back and self._begins(pending)
        if begins and self.waiting:
            # Not before those that wait already.
            self.waiting.add(pending)
            self._may_have_room = True
        elif not self._placed(pending, now_ms, begins=begins):
            self.waiting.add(pending)

    def _begins(self, pending: PendingRound) -> bool:
        """Return whether no verifier works on a round's session yet, and none has KV of it."""
        session = self.sessions.get(pending.session_id)
        placed = session is not None and session.verifier_id is not None
        return not placed and placement.home(pending, self.verifiers.values()) is None

    def begin_waiting(self, now_ms: float) -> list[ActiveSession]:
        """Queue the rounds of the waiting sessions for which there is room now; return these sessions.

        A session that has waited for the longest time lets no others pass on the verifiers that may take it: it may be
        the longest of all.
        """
        begun: list[ActiveSession] = []
        if not self._may_have_room or not self.waiting:
            return begun
        self._may_have_room = False
        while self.waiting and (session_id := self._begin_one(now_ms)) is not None:
            self._began += 1
            begun.append(self.sessions[session_id])
        return begun

    def _begin_one(self, now_ms: float) -> str | None:
        """Queue the first waiting round for which there is room; return its session's id, or None if there is none."""
        late_first = self._began % LATE_TURN == LATE_TURN - 1
        kept: set[str] = set()
        tried: Counter[Kind] = Counter()
        # Sessions of another model or arithmetic may have room on other verifiers.
        without: set[Kind] = set()
        for pending in self.waiting.order(now_ms, late_first=late_first, without=without):
            kind = kind_of(pending)
            tried[kind] += 1
            begins = self._begins(pending) and not has_paused(pending, now_ms)
            if self._placed(pending, now_ms, begins=begins, kept=kept):
                self.waiting.remove(pending.session_id)
                return pending.session_id
            if tried[kind] == MOST_TRIED:
                without.add(kind)
            if now_ms - pending.arrived_ms >= self._max_wait_ms:
                without.add(kind)
                kept.update(v.verifier_id for v in placement.fitting(pending, self.verifiers.values(), mix=self._mix))
        return None

    def _placed(
        self, pending: PendingRound, now_ms: float, *, begins: bool, kept: Collection[str] = frozenset()
    ) -> bool:
        """Queue a round, or note that no verifier may take it; return False if its session `begins` and has no room.

        kept: verifiers whose room is for others.
        """

        def has_room(verifier: VerifierState) -> bool:
            return verifier.verifier_id not in kept and self._room.fits(pending, verifier, now_ms)

        if begins:
            able = placement.fitting(pending, self.verifiers.values(), mix=self._mix)
            # A session that no cache is large enough for need not wait.
            if any(v.heartbeat.total_tokens >= pending.length_after for v in able) and not any(map(has_room, able)):
                return False
        state = placement.place(
            pending,
            self.verifiers.values(),
            self.queues,
            now_ms,
            migrate=self._migrate,
            mix=self._mix,
            prompt_rate=self.prompt_rate,
            has_room=has_room if begins else None,
        )
        self._assign(pending.session_id, state)
        if state is None:
            self.unplaced[pending.session_id] = pending
        else:
            held = state.holds(pending.session_id)
            self.queues[state.verifier_id].add(queued_round(state.model, pending, held, self._max_wait_ms))
        return True

    def remove(self, session_id: str) -> PendingRound | None:
        """Remove and return a session's pending round; None if it has none."""
        if (pending := self.unplaced.pop(session_id, None) or self.waiting.remove(session_id)) is not None:
            return pending
        for queue in self.queues.values():
            if (queued := queue.remove(session_id)) is not None:
                return queued.pending
        return None

    def on_heartbeat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        """Update a verifier. Its residency replaces what was assumed about its cache."""
        verifier_id = heartbeat.verifier
        state = self.verifiers.get(verifier_id)
        changed = state is not None and state.heartbeat.arithmetic != heartbeat.arithmetic
        joins = not heartbeat.draining and (state is None or not state.usable or changed)
        leaves = state is not None and state.usable and (heartbeat.draining or changed)
        unknown_before = None if state is None else state.unknown_sessions
        if state is None:
            model = self._models.get(verifier_id, cost.FALLBACK)
            state = VerifierState(heartbeat, now_ms, model, idle_since_ms=now_ms)
            self.verifiers[verifier_id] = state
            self.queues[verifier_id] = RoundQueue()
            self._sorted_by[verifier_id] = model
        state.heartbeat, state.seen_ms = heartbeat, now_ms
        before, state.cached = state.cached, {held.session: held.cached for held in heartbeat.residency}
        state.spared = spared(heartbeat)
        state.unknown_sessions = unknown_sessions(heartbeat, self.sessions, unknown_before, now_ms)
        queued = self.queues[verifier_id].rounds
        moved = list(queued) if leaves else [s for s in queued if before.get(s) != state.cached.get(s)]
        if joins:
            # Rounds without KV on any verifier may as well start on this one.
            moved += [s for queue in self.queues.values() for s, one in queue.rounds.items() if not one.held]
            moved += self.unplaced
        self._place_again(dict.fromkeys(moved), now_ms)
        self._may_have_room = True

    def on_cost_model(self, model: CostModel, now_ms: float) -> None:
        """Predict a verifier's times by this model from now on."""
        self._models.pop(model.verifier, None)  # the latest changed model is the last one
        self._models[model.verifier] = model
        while len(self._models) > max(REMEMBERED, len(self.verifiers)):
            del self._models[next(iter(self._models))]
        if (state := self.verifiers.get(model.verifier)) is None:
            return
        state.model = model
        sorted_by = self._sorted_by[model.verifier]
        if not 1 / CHANGED < cost.token_ms(model) / max(1e-9, cost.token_ms(sorted_by)) < CHANGED:
            self._sorted_by[model.verifier] = model
            self._place_again(self.queues[model.verifier].rounds, now_ms)

    def drop(self, verifier_id: str, now_ms: float) -> list[PendingRound]:
        """Remove a verifier and place its queued rounds elsewhere; return the rounds of its batches in flight."""
        state, queue = self.verifiers.pop(verifier_id), self.queues.pop(verifier_id)
        del self._sorted_by[verifier_id]
        self._room.drop(verifier_id)
        for session in state.sessions.values():
            session.verifier_id = None
        for queued in queue.rounds.values():
            self.add(queued.pending, now_ms)
        return [pending for flight in state.in_flight for pending in flight.jobs.values()]

    def forget(self, session_id: str) -> None:
        """Remove a session that has ended."""
        self._may_have_room = True
        self.remove(session_id)
        self._assign(session_id, None)
        self.sessions.pop(session_id, None)
        for state in self.verifiers.values():
            state.cached.pop(session_id, None)
            state.unknown_sessions.pop(session_id, None)
            state.returning.pop(session_id, None)
            state.runs.pop(session_id)

    def _assign(self, session_id: str, state: VerifierState | None) -> None:
        if (session := self.sessions.get(session_id)) is None:
            return
        if (before := self.verifiers.get(session.verifier_id or "")) is not None:
            before.unassign(session_id)
            self._room.remove(session_id, before.verifier_id)
        session.verifier_id = None if state is None else state.verifier_id
        if state is not None:
            state.assign(session_id, session)
            self._room.add(session_id, session, state)

    def _place_again(self, session_ids: Iterable[str], now_ms: float) -> None:
        removed = [pending for session_id in list(session_ids) if (pending := self.remove(session_id)) is not None]
        for pending in removed:
            self.add(pending, now_ms)
