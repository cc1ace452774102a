"""Synthetic answers: words drawn from the seed and the position, so that no draft, batch or retry changes them."""

from __future__ import annotations

from shared.sampling.noise import noise_key
from shared.twin.spec import TwinSpec

_STOP_BITS = 32


class SyntheticText:
    """The answers of a twin, by seed."""

    def __init__(self, spec: TwinSpec) -> None:
        assert spec.words is not None  # a twin without a trace has words
        self._words = spec.words
        self._stop_id = spec.stop_id
        self._stops_below = (1 << _STOP_BITS) / spec.answer_tokens

    def token(self, seed: int, index: int) -> int:
        """Return output token `index` of the answer with this seed. An answer has at least one word."""
        key = noise_key(seed, index)
        if self._stop_id is not None and index and key >> 32 < self._stops_below:
            return self._stop_id
        return self._words[key % (1 << _STOP_BITS) % len(self._words)]

    def other(self, seed: int, index: int) -> int:
        """Return a word that output token `index` is not: a wrong draft."""
        return self._words[(noise_key(seed, index) % (1 << _STOP_BITS) + 1) % len(self._words)]
