"""The interface of draft sources, and the source that never drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from services.drafter.control import DraftRound
from shared.messages import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.sampling.rules import TokenMask


@dataclass(frozen=True)
class States:
    """The target's final hidden states at consecutive positions from `start` on: float32 (rows, hidden size)."""

    start: int
    rows: NDArray[np.float32]


class Masks(Protocol):
    """The tokens that a session's grammar allows."""

    def mask(self, tokens: Sequence[int]) -> TokenMask:
        """Return the masks from the position after these tokens of the session on."""


@dataclass(frozen=True)
class Prediction:
    """The output that a session's client expects. The output begins at position `start` of the session."""

    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class DraftRequest:
    """A request to draft after a session's committed `tokens`.

    The source adds every token that it drafts to `round`, which decides whether to keep it and whether to go on.
    """

    session_id: str
    tokens: Sequence[int]
    sampling: Sampling
    round: DraftRound
    sources: tuple[str, ...]
    """The sources that may propose tokens, as in `DraftToken.source`."""
    states: States | None = None
    """Hidden states that the source has not read yet, up to the one before the last token; None if any is missing."""
    prompt_len: int = 0
    """Tokens of the session's prompt, with which `tokens` begins."""
    prediction: Prediction | None = None
    """The same in each of a session's requests; None if its client expects nothing."""
    grammar: Masks | None = None
    """The grammar of the session; None if its text is free."""

    def mask(self, drafted: Sequence[int] = ()) -> TokenMask | None:
        """Return the masks from the position after these draft tokens on; None if all tokens are allowed."""
        return None if self.grammar is None else self.grammar.mask([*self.tokens, *drafted])


@dataclass(frozen=True)
class Draft:
    """Draft tokens, and the work that they took."""

    tokens: list[int] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    """Draft steps of each source, those for dropped tokens included."""
    computed: int = 0
    """Committed tokens that had to be computed first."""
    dropped: int | None = None
    """The token that was drafted after these and not kept; None if there is none."""


@dataclass(frozen=True)
class AheadRequest:
    """A request to prepare drafts for the round after one in flight, for its likely outcomes."""

    request: DraftRequest
    """Of the round in flight, with the hidden states that the source has not read yet."""
    draft: Draft
    """The draft in flight."""
    begin: Callable[[int], DraftRound]
    """Returns a round that follows this many more tokens, at most one more than the draft has."""
    most: int
    """Most outcomes."""
    wanted: Callable[[], bool] = lambda: True
    """Asked between two steps. If it returns False, the source ends at once, with shorter drafts."""


@dataclass(frozen=True)
class PreparedDraft:
    """A draft that follows a round in flight if it brings `tokens`: the accepted ones and the bonus token."""

    tokens: list[int]
    draft: Draft
    round: DraftRound


class DraftSource(Protocol):
    """Drafts tokens for many sessions at once.

    A session begins with its first request and ends with `close`. Calls come one at a time.
    """

    blocking: bool
    """True if `propose` takes so long that it has to run outside the event loop."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return one draft per request, in order; a draft may be shorter than wanted. Never changes `tokens`."""

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        """Prepare drafts for the likely outcomes of rounds in flight: for each request its own, likeliest first.

        Call it for sessions whose latest `propose` or `ahead` was about the round in flight or the one before.
        """

    def computes(self, request: DraftRequest) -> bool:
        """Return whether `propose` runs a model for this request; if not, it may be called in any thread."""

    def starts_at(self, session_id: str, count: int) -> int:
        """Return the position of the first token to compute for a draft after `count` committed tokens.

        States are needed from the one before it on. Without states: 0.
        """

    def close(self, session_id: str) -> None:
        """Forget a session that has ended."""


class WithoutStates:
    """Base of sources that read no hidden states and never draft ahead."""

    blocking: bool

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        """Return no drafts."""
        return [[] for _ in requests]

    def computes(self, request: DraftRequest) -> bool:
        """Return whether the source blocks."""
        return self.blocking

    def starts_at(self, session_id: str, count: int) -> int:
        """Return 0: the source reads no states."""
        return 0


class NoDrafts(WithoutStates):
    """Plain decoding: every round brings the target's own next token."""

    blocking = False

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return empty drafts."""
        return [Draft() for _ in requests]

    def close(self, session_id: str) -> None:
        """Do nothing: no session is remembered."""
