"""Sessions that wait for room in the verifiers' caches, kept in the order in which they should begin.

There may be thousands, of which a decision tries a few. Adding and removing one costs O(log n) comparisons.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from heapq import merge
from typing import Literal

from services.scheduler.core.pool import PendingRound

Kind = tuple[str, ...]
"""The model and arithmetic of a session: it may begin on the same verifiers as others of its kind."""
Line = Literal["begun", "timely", "late"]
Place = tuple[float, str]
"""A session's sort key in its line, and its id."""


def kind_of(pending: PendingRound) -> Kind:
    """Return the kind of a round's session."""
    return pending.verify.fingerprint, *pending.verify.committed_in


class WaitingSessions(Mapping[str, PendingRound]):
    """The pending rounds of the sessions that wait, by session, in order of arrival here."""

    def __init__(self, max_wait_ms: float) -> None:
        """max_wait_ms: see `PendingRound.deadline_ms`."""
        self._max_wait_ms = max_wait_ms
        self._rounds: dict[str, PendingRound] = {}
        self._lines: dict[Line, dict[Kind, list[Place]]] = {
            "begun": defaultdict(list),
            "timely": defaultdict(list),
            "late": defaultdict(list),
        }
        self._due: list[Place] = []
        """When the tokens of timely sessions are due, the earliest first."""

    def __getitem__(self, session_id: str) -> PendingRound:
        return self._rounds[session_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rounds)

    def __len__(self) -> int:
        return len(self._rounds)

    def add(self, pending: PendingRound) -> None:
        """Add a session that does not wait yet."""
        session_id = pending.session_id
        self._rounds[session_id] = pending
        if pending.verify.round > 0:
            self._insert("begun", pending)
            return
        # Those that are late already leave this line with the next order.
        self._insert("timely", pending)
        if pending.due_ms is not None:
            insort(self._due, (pending.due_ms, session_id))

    def remove(self, session_id: str) -> PendingRound | None:
        """Remove a session and return its round; None if it does not wait."""
        if (pending := self._rounds.pop(session_id, None)) is None:
            return None
        if pending.verify.round > 0:
            self._delete("begun", pending)
        elif pending.due_ms is None or _found(self._due, (pending.due_ms, session_id)):
            self._delete("timely", pending)
            if pending.due_ms is not None:
                _delete(self._due, (pending.due_ms, session_id))
        else:
            self._delete("late", pending)
        return pending

    def order(self, now_ms: float, *, late_first: bool, without: Collection[Kind] = ()) -> Iterator[PendingRound]:
        """Iterate over the rounds in the order in which their sessions should begin. Change nothing meanwhile.

        First those that have begun before and lost their verifier, then by deadline. Sessions that are late already
        come last, in order of arrival, since they would only make others late; with `late_first` one of them comes
        before those that are in time.
        now_ms: never less than before. without: kinds to leave out; it may grow meanwhile.
        """
        self._note_late(now_ms)
        yield from self._line("begun", without)
        turn = min((line[0] for line in self._lines["late"].values() if line), default=None) if late_first else None
        if turn is not None and kind_of(pending := self._rounds[turn[1]]) not in without:
            yield pending
        yield from self._line("timely", without)
        for pending in self._line("late", without):
            if turn is None or pending.session_id != turn[1]:
                yield pending

    def _line(self, line: Line, without: Collection[Kind]) -> Iterator[PendingRound]:
        places = merge(*(_while_wanted(kind, line, without) for kind, line in self._lines[line].items()))
        return (self._rounds[session_id] for _, session_id in places)

    def _note_late(self, now_ms: float) -> None:
        """Move the sessions that have become late to their line."""
        count = bisect_left(self._due, (now_ms, ""))
        for _, session_id in self._due[:count]:
            pending = self._rounds[session_id]
            self._delete("timely", pending)
            self._insert("late", pending)
        del self._due[:count]

    def _insert(self, line: Line, pending: PendingRound) -> None:
        insort(self._lines[line][kind_of(pending)], self._place(line, pending))

    def _delete(self, line: Line, pending: PendingRound) -> None:
        kind = kind_of(pending)
        _delete(self._lines[line][kind], self._place(line, pending))
        if not self._lines[line][kind]:
            del self._lines[line][kind]

    def _place(self, line: Line, pending: PendingRound) -> Place:
        key = pending.deadline_ms(self._max_wait_ms) if line == "timely" else pending.arrived_ms
        return key, pending.session_id


def _while_wanted(kind: Kind, line: list[Place], without: Collection[Kind]) -> Iterator[Place]:
    for place in line:
        if kind in without:
            return
        yield place


def _found(line: list[Place], place: Place) -> bool:
    index = bisect_left(line, place)
    return index < len(line) and line[index] == place


def _delete(line: list[Place], place: Place) -> None:
    del line[bisect_left(line, place)]
