"""Draft tokens of a trace for simulations. A twin of the same trace and seed drafts the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from services.drafter.control import ControlWeights, DraftToken
from services.drafter.control_files import load_weights
from services.drafter.core.synthetic import SOURCE, SyntheticToken
from services.drafter.hidden.card import CONTROLLER, SHIPPED
from services.drafter.sources.twin import token_of
from shared.twin.files import trace_path
from shared.twin.trace import DEPTH, PRESENT, Trace, TraceText, load_trace

CHAIN = "hidden"
"""The trace's chain to draft from: the model's own, since simulations have no prompt lookup."""


@dataclass(frozen=True)
class TracedDrafts:
    """The draft model of a trace. Two of the same name are equal."""

    name: str
    trace: Trace = field(compare=False, repr=False)

    @cached_property
    def weights(self) -> ControlWeights:
        """The trained acceptance model of the draft that was recorded; untrained if it is not shipped."""
        shipped = SHIPPED / str(self.trace.facts.get("draft")) / CONTROLLER
        return load_weights(shipped) if shipped.is_file() else ControlWeights()

    @cached_property
    def _text(self) -> TraceText:
        return TraceText(self.trace)

    @cached_property
    def _right(self) -> NDArray[np.bool_]:
        return self.trace.correct(CHAIN)

    def of_request(self, seed: int) -> _RequestDrafts:
        """Return the draft tokens of the request with this seed."""
        return _RequestDrafts(self, seed)

    def token(self, seed: int, position: int, ahead: int) -> SyntheticToken:
        """Return a recorded token; where none is, a wrong one that looks unlikely, as on a twin."""
        row, chain = self._text.place(seed, position), self.trace.chains[CHAIN]
        if ahead >= DEPTH or not chain.flags[row, ahead] & PRESENT:
            return SyntheticToken(DraftToken(SOURCE), right=False)
        return SyntheticToken(token_of(SOURCE, chain, row, ahead), bool(self._right[row, ahead]))


@dataclass(frozen=True)
class _RequestDrafts:
    """The draft tokens of one request."""

    model: TracedDrafts
    seed: int

    def token(self, position: int, ahead: int) -> SyntheticToken:
        """Return the token `ahead` tokens after the last committed one, in a round that begins at output `position`."""
        return self.model.token(self.seed, position, ahead)


@lru_cache(maxsize=4)
def traced_drafts(name: str) -> TracedDrafts:
    """Return the drafts of a shipped trace by name, or of a file by path. Raises ModelError."""
    return TracedDrafts(name, load_trace(trace_path(name)))
