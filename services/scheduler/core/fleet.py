"""The verifiers, the sessions, and which round waits for which verifier. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from services.scheduler.core import placement
from services.scheduler.core.pool import Known, Pending, VerifierState
from services.scheduler.core.round_queue import Queue, seen_by
from shared import cost
from shared.messages import CostModel, Heartbeat

CHANGED = 1.25
"""A verifier whose predicted times have changed by this factor has its queue sorted anew."""


class Fleet:
    """Every round that waits is in exactly one place: in the queue of a verifier, or unplaced while none is usable."""

    def __init__(self, max_wait_ms: float, *, migrate: bool) -> None:
        """max_wait_ms: see `Pending.deadline_ms`. migrate: sessions may leave the verifier that holds their K/V."""
        self.verifiers: dict[str, VerifierState] = {}
        self.queues: dict[str, Queue] = {}
        self.unplaced: dict[str, Pending] = {}
        self.known: dict[str, Known] = {}
        self._max_wait_ms = max_wait_ms
        self._migrate = migrate
        self._models: dict[str, CostModel] = {}
        self._sorted_by: dict[str, CostModel] = {}

    @property
    def waiting(self) -> int:
        """Rounds that wait."""
        return len(self.unplaced) + sum(len(queue) for queue in self.queues.values())

    def pending(self) -> Iterator[Pending]:
        """The rounds that wait."""
        yield from self.unplaced.values()
        for queue in self.queues.values():
            for waiting in queue.waiting.values():
                yield waiting.pending

    def waits(self, session: str) -> Pending | None:
        """The session's round if it waits."""
        if (pending := self.unplaced.get(session)) is not None:
            return pending
        for queue in self.queues.values():
            if (waiting := queue.waiting.get(session)) is not None:
                return waiting.pending
        return None

    def add(self, pending: Pending, now_ms: float) -> None:
        """Let a round wait for the verifier that suits it best."""
        state = placement.place(pending, self.verifiers.values(), self.queues, now_ms, self._migrate)
        self._assign(pending.session, state)
        if state is None:
            self.unplaced[pending.session] = pending
        else:
            cached = state.cached.get(pending.session, 0)
            self.queues[state.name].add(seen_by(state.model, pending, cached, self._max_wait_ms))

    def remove(self, session: str) -> Pending | None:
        """Take a session's round out of wherever it waits."""
        if (pending := self.unplaced.pop(session, None)) is not None:
            return pending
        for queue in self.queues.values():
            if (waiting := queue.remove(session)) is not None:
                return waiting.pending
        return None

    def on_heartbeat(self, heartbeat: Heartbeat, now_ms: float) -> None:
        """A verifier is there; what it says that it holds replaces what was believed."""
        name = heartbeat.verifier
        state = self.verifiers.get(name)
        joins = not heartbeat.draining and (state is None or not state.usable)
        leaves = heartbeat.draining and state is not None and state.usable
        if state is None:
            state = VerifierState(heartbeat, now_ms, self._models.get(name, cost.FALLBACK), idle_since_ms=now_ms)
            self.verifiers[name] = state
            self.queues[name] = Queue()
        state.heartbeat, state.seen_ms = heartbeat, now_ms
        before, state.cached = state.cached, {held.session: held.cached for held in heartbeat.residency}
        state.strangers = sum(1 for session in state.cached if session not in self.known)
        waiting = self.queues[name].waiting
        moved = list(waiting) if leaves else [s for s in waiting if before.get(s) != state.cached.get(s)]
        if joins:
            # Rounds that have no K/V anywhere may as well start there.
            moved += [s for queue in self.queues.values() for s, one in queue.waiting.items() if not one.held]
            moved += self.unplaced
        self._replace(dict.fromkeys(moved), now_ms)

    def on_cost_model(self, model: CostModel, now_ms: float) -> None:
        """A verifier's times are predicted by this from now on."""
        self._models[model.verifier] = model
        if (state := self.verifiers.get(model.verifier)) is None:
            return
        state.model = model
        known = self._sorted_by.get(model.verifier, cost.FALLBACK)
        if not 1 / CHANGED < cost.token_ms(model) / max(1e-9, cost.token_ms(known)) < CHANGED:
            self._sorted_by[model.verifier] = model
            self._replace(self.queues[model.verifier].waiting, now_ms)

    def drop(self, name: str, now_ms: float) -> list[Pending]:
        """A verifier is gone. Its waiting rounds go to others; returns those that it was working on."""
        state, queue = self.verifiers.pop(name), self.queues.pop(name)
        for known in self.known.values():
            if known.verifier == name:
                known.verifier = None
        for waiting in queue.waiting.values():
            self.add(waiting.pending, now_ms)
        return [pending for flight in state.in_flight for pending in flight.jobs.values()]

    def forget(self, session: str) -> None:
        """The session is not under way any more."""
        self.remove(session)
        self._assign(session, None)
        self.known.pop(session, None)
        for state in self.verifiers.values():
            state.cached.pop(session, None)
            state.returning.pop(session, None)

    def _assign(self, session: str, state: VerifierState | None) -> None:
        if (known := self.known.get(session)) is None:
            return
        if (before := self.verifiers.get(known.verifier or "")) is not None:
            before.assigned -= 1
        known.verifier = None if state is None else state.name
        if state is not None:
            state.assigned += 1

    def _replace(self, sessions: Iterable[str], now_ms: float) -> None:
        """Let rounds that wait choose their verifier again."""
        removed = [pending for session in list(sessions) if (pending := self.remove(session)) is not None]
        for pending in removed:
            self.add(pending, now_ms)
