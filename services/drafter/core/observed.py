"""Texts that a drafter has seen, with the target's hidden states, for its draft to learn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.messages import HiddenStates, Sampling
from shared.models.bfloat16 import nearest_bits
from shared.models.hidden_states import Bits, unpack

SHORTEST = 16
"""Fewest answer tokens of a text to learn from."""


@dataclass(frozen=True)
class ObservedText:
    """Committed tokens of a session, with the target's state at each of them but the last."""

    tokens: NDArray[np.int32]
    states: Bits
    """(tokens - 1, hidden size)"""
    prompt_len: int
    """Number of its first tokens that belong to the session's prompt."""
    start: int
    """Position of its first token in the session."""
    sampling: Sampling

    @property
    def answer_tokens(self) -> int:
        """Number of its tokens that the target chose."""
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True)
class ObservedSession:
    """A session that has ended, and its recorded states."""

    tokens: Sequence[int]
    prompt_len: int
    sampling: Sampling
    recorder: StateRecorder

    def texts(self) -> list[ObservedText]:
        """Return its texts to learn from."""
        return self.recorder.texts(self.tokens, self.prompt_len, self.sampling)


class StateRecorder:
    """The hidden states of one session's last tokens, as received. Messages may come twice, late or never."""

    def __init__(self, size: int, most: int) -> None:
        """size: the target's hidden size. most: most rows kept."""
        self._size = size
        self._most = most
        self._messages: deque[HiddenStates] = deque()
        self._rows = 0

    def add(self, message: HiddenStates) -> None:
        """Keep a message, and drop the oldest ones beyond the limit. Ignores states of another hidden size."""
        if message.size != self._size:
            return
        self._messages.append(message)
        self._rows += message.count
        while self._rows - self._messages[0].count >= self._most:
            self._rows -= self._messages.popleft().count

    def texts(self, tokens: Sequence[int], prompt_len: int, sampling: Sampling) -> list[ObservedText]:
        """Return the runs of the session's committed tokens whose states are known, each long enough to learn from."""
        rows = {
            message.start + i: row
            for message in self._messages
            for i, row in enumerate(nearest_bits(unpack(message)))
            if message.start + i < len(tokens) - 1
        }
        texts = (
            ObservedText(
                np.array(tokens[start : stop + 1], np.int32),
                np.stack([rows[position] for position in range(start, stop)]),
                max(0, min(prompt_len, stop + 1) - start),
                start,
                sampling,
            )
            for start, stop in _runs(sorted(rows))
        )
        return [text for text in texts if text.answer_tokens >= SHORTEST]


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and end of each run of consecutive positions."""
    first = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            yield positions[first], positions[i - 1] + 1
            first = i
