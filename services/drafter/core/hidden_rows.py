"""What a drafter holds of the target's hidden states of one session, and which it still has to ask for. Pure.

Messages may come twice, late or never. A row is a function of the committed tokens up to its position, so two messages
that tell of the same position say the same, and a lost one leaves a gap and nothing wrong.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import MessageError
from shared.messages import HiddenStates
from shared.models.hidden_states import Floats, unpack


class HiddenRows:
    """Rows by position: those received, from the first that is still of use.

    Takes 4 bytes per element from the first useful position to the last received one: `need_from` keeps that short.
    Not thread-safe.
    """

    def __init__(self, size: int, limit: int) -> None:
        """size: elements per row, the target's hidden size. limit: the target's context in tokens; it bounds the
        memory that a wrong message can take."""
        self.size = size
        self._limit = limit
        self._first = 0
        """The position of `_rows[0]`."""
        self._rows: Floats = np.empty((0, size), np.float32)
        self._held: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Which of `_rows` have been received; as long as `_rows`, or shorter by what nothing was received of."""

    def add(self, message: HiddenStates) -> None:
        """Take rows in. Raises MessageError if they are not of this hidden size."""
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
        """`hidden_from` of the next Verify, at `committed_len` committed tokens: the first position of use that is
        missing. None if the session has left the limit."""
        missing = np.flatnonzero(~self._held)
        first_missing = self._first + (int(missing[0]) if len(missing) else len(self._held))
        # The next round brings the row of the last committed token at least, whatever was received ahead of it.
        wanted = max(self._first, min(first_missing, committed_len - 1))
        return wanted if wanted < self._limit else None

    def run(self, committed_len: int) -> tuple[int, Floats]:
        """The longest run of rows without a gap that ends with the newest that there can be at `committed_len` tokens,
        the one at `committed_len - 2`: its first position, and (rows, size), not to be written to and
        good until the next `add`.

        No rows, and the position after the newest, if that one is missing.
        """
        stop = committed_len - 1 - self._first
        if stop > len(self._held) or stop < 1:
            return committed_len - 1, self._rows[:0]
        gaps = np.flatnonzero(~self._held[:stop])
        start = int(gaps[-1]) + 1 if len(gaps) else 0
        return self._first + start, self._rows[start:stop]

    def need_from(self, position: int) -> None:
        """Only rows from `position` on are of use from now on. That is usually later than before; where it is earlier,
        because the reader lost what it had made of them, all rows will be asked for again."""
        count = position - self._first
        self._first = position
        if count < 0:
            self._rows, self._held = self._rows[:0], self._held[:0]
        if count <= 0:
            return
        self._rows = self._rows[count : len(self._held)].copy()
        self._held = self._held[count:].copy()

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens are still committed: forget what was told of the others."""
        kept = max(0, length - self._first)
        self._held = self._held[:kept]
        if length <= self._first:
            # Consumed or not, the row of the last token is needed once a token follows it.
            self._first = max(0, length - 1)

    def _reserve(self, count: int) -> None:
        """Make `_held` at least this long, and `_rows` as long or longer."""
        if count > len(self._rows):
            grown = np.empty((min(max(count, 2 * len(self._rows)), self._limit), self.size), np.float32)
            grown[: len(self._held)] = self._rows[: len(self._held)]
            self._rows = grown
        if count > len(self._held):
            held = np.zeros(count, np.bool_)
            held[: len(self._held)] = self._held
            self._held = held
