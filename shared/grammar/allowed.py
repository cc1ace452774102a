"""The tokens that may come next in an answer with a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

FEW = 4096
"""Up to this many allowed tokens, their logits are kept one by one."""


class GrammarPlaces(Protocol):
    """Answers questions about the places of an answer. Its methods raise GrammarError where that is too expensive."""

    needs_mask: bool
    """True if the last choice needed a mask."""

    def mask_after(self, tokens: list[int]) -> Words:
        """Return the mask of the place behind these tokens."""

    def is_allowed(self, tokens: list[int], token: int) -> bool:
        """Return whether a token may come behind these tokens."""


class AllowedTokens:
    """The tokens that may come next.

    The mask is computed when it is first needed. Most choices need none: the token that the logits choose without it
    is looked up alone.
    """

    def __init__(self, forced: Sequence[int], places: GrammarPlaces, tokens: list[int], length: int) -> None:
        """forced: the only token that may come next and those that must follow it; empty where there is a choice.

        tokens: begin with the `length` tokens before the place.
        """
        self.forced = forced
        self.only = forced[0] if forced else None
        """The only token that may come next; None if there may be several."""
        self.follows: int | None = None
        """A token that may come next, if one is known."""
        self._places = places
        self._tokens = tokens
        self._length = length
        self._looked_at = False

    @property
    def is_likely_masked(self) -> bool:
        """True if a choice here is likely to need the mask: there is a choice, and the last one needed its mask."""
        return not self.forced and self._places.needs_mask

    def prepare(self) -> None:
        """Compute the mask, in the form in which a choice uses it. Raises GrammarError where that is too expensive."""
        if self.few is None:
            _ = self.flags

    @cached_property
    def words(self) -> Words:
        """A bit for each token of the vocabulary, from the lowest one of the first word on."""
        return self._places.mask_after(self._tokens[: self._length])

    @cached_property
    def few(self) -> Ids | None:
        """The tokens that may come next, ascending, if they are at most `FEW`; None if they are more."""
        if self.forced:
            return np.array([self.forced[0]])
        # Mostly few words have bits; to look at those alone is many times as fast as to unpack all.
        (at,) = self.words.nonzero()
        words = self.words[at]
        if int(np.bitwise_count(words).sum()) > FEW:
            return None
        (bits,) = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()
        few: Ids = at[bits >> 5] * 32 + (bits & 31)
        return few

    @cached_property
    def flags(self) -> NDArray[np.bool_]:
        """One flag for each token."""
        return np.unpackbits(self.words.view(np.uint8), bitorder="little").view(np.bool_)

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""
        if self.forced:
            return token == self.forced[0]
        if "words" in self.__dict__:  # where it is computed, which it is not for this question
            words = self.words
            allowed = 0 <= token < 32 * len(words) and bool(words[token >> 5] >> (token & 31) & 1)
        else:
            allowed = token == self.follows or self._places.is_allowed(self._tokens[: self._length], token)
        self._note(masked=not allowed)
        return allowed

    def _note(self, *, masked: bool) -> None:
        """Note whether the choice at this place needs a mask, when it is first looked at."""
        if not self._looked_at:
            self._looked_at, self._places.needs_mask = True, masked

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        """Set the logits of tokens that may not come next to -inf. ids: the tokens of the columns; None for all."""
        self._note(masked=not self.forced)
        if ids is not None:
            columns = np.flatnonzero(ids == self.forced[0] if self.forced else self.flags[ids])
        elif self.few is None:
            flags = self.flags
            if len(flags) < len(logits):
                logits[len(flags) :] = -np.inf
            np.copyto(logits[: len(flags)], np.float32(-np.inf), where=~flags[: len(logits)])
            return
        else:
            columns = self.few
        columns = columns[columns < len(logits)]
        kept = logits[columns]
        logits.fill(-np.inf)
        logits[columns] = kept
