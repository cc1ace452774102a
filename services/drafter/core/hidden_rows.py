"""The target's hidden states of one session, as received by its drafter, and the positions still to request.

Messages may arrive twice, late or never. A row is a function of the committed tokens up to its position, so two
messages with the same position agree, and a lost message leaves a gap but no wrong row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import MessageError
from shared.messages import HiddenStates
from shared.models.hidden_states import Floats, unpack


class HiddenRows:
    """Received rows by position, from the first that is still needed.

    Takes 4 bytes per element from the first needed position to the last received one; `need_from` frees rows.
    Not thread-safe.
    """

    def __init__(self, size: int, limit: int) -> None:
        """size: elements per row, the target's hidden size. limit: the target's context in tokens; it bounds the
        memory that an invalid message can take."""
        self.size = size
        self._limit = limit
        self._first = 0
        """The position of `_rows[0]`."""
        self._rows: Floats = np.empty((0, size), np.float32)
        self._held: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Marks the rows of `_rows` that have been received; ends with the last of them."""

    def add(self, message: HiddenStates) -> None:
        """Add received rows. Raises MessageError if their hidden size is another."""
        if message.size != self.size:
            raise MessageError(
                f"hidden states of size {message.size}, the draft model reads {self.size}: it was trained for another "
                "target; give the drafter the draft model of this target"
            )
        start = max(message.start, self._first)
        stop = min(message.start + message.count, self._limit)
        if start >= stop:
            return
        self._reserve(stop - self._first)
        here = slice(start - self._first, stop - self._first)
        self._rows[here] = unpack(message)[start - message.start : stop - message.start]
        self._held[here] = True

    def wanted(self, committed_len: int) -> int | None:
        """Return `hidden_from` of the next Verify, at `committed_len` committed tokens: the first missing position that
        is needed. None if the session has passed the limit."""
        missing = np.flatnonzero(~self._held)
        first_missing = self._first + (int(missing[0]) if len(missing) else len(self._held))
        # The next round yields at least the row of the last committed token, also where later rows arrived early.
        wanted = max(self._first, min(first_missing, committed_len - 1))
        return wanted if wanted < self._limit else None

    def run(self, committed_len: int) -> tuple[int, Floats]:
        """Return the longest run of rows without a gap that ends at the last possible position, `committed_len - 2`.

        Returns its first position and the rows (rows, size), a view that is valid until the next `add` and not to be
        written to. If the last row is missing: no rows, and the position after it.
        """
        stop = committed_len - 1 - self._first
        if stop > len(self._held) or stop < 1:
            return committed_len - 1, self._rows[:0]
        gaps = np.flatnonzero(~self._held[:stop])
        start = int(gaps[-1]) + 1 if len(gaps) else 0
        return self._first + start, self._rows[start:stop]

    def need_from(self, position: int) -> None:
        """Drop the rows before `position`, which are needed no more.

        If `position` is earlier than before, because the draft model lost its cache, all rows are requested again.
        """
        count = position - self._first
        self._first = position
        if count < 0:
            self._rows, self._held = self._rows[:0], self._held[:0]
        if count <= 0:
            return
        self._rows = self._rows[count : len(self._held)].copy()
        self._held = self._held[count:].copy()

    def truncate(self, length: int) -> None:
        """Drop the rows of all but the first `length` tokens, the only ones still committed."""
        kept = max(0, length - self._first)
        self._held = self._held[:kept]
        if length <= self._first:
            # The row of the last token is needed again once a token follows it.
            self._first = max(0, length - 1)

    def _reserve(self, count: int) -> None:
        """Grow `_held` to at least `count` rows, and `_rows` to as many or more."""
        if count > len(self._rows):
            grown = np.empty((min(max(count, 2 * len(self._rows)), self._limit), self.size), np.float32)
            grown[: len(self._held)] = self._rows[: len(self._held)]
            self._rows = grown
        if count > len(self._held):
            held = np.zeros(count, np.bool_)
            held[: len(self._held)] = self._held
            self._held = held
