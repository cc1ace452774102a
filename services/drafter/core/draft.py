"""The interface of draft sources, and the one that never drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.drafter.control import Round
from shared.messages import Sampling


@dataclass(frozen=True)
class States:
    """The target's final hidden states at consecutive positions from `start` on: float32 (rows, hidden size)."""

    start: int
    rows: NDArray[np.float32]


@dataclass(frozen=True)
class DraftRequest:
    """A session that wants a draft after its committed `tokens`.

    The source adds every token to `round`, which says whether to keep it and whether to go on. `states` are those of
    the target that the source has not seen yet, up to the one before the last token; None if they are not there.
    """

    session: str
    tokens: Sequence[int]
    sampling: Sampling
    round: Round
    names: tuple[str, ...]
    """The sources that it may use, as its guesses name them."""
    states: States | None = None


@dataclass(frozen=True)
class Draft:
    """Guessed tokens; how many steps each source took for them, those for dropped tokens included; how many committed
    tokens had to be computed first."""

    tokens: list[int] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    computed: int = 0


@dataclass(frozen=True)
class Ahead:
    """A draft made while a round was in flight, for the case that all of it is accepted and followed by `bonus`."""

    bonus: int
    draft: Draft


class DraftSource(Protocol):
    """Guesses tokens for many sessions at once.

    `propose` never changes `tokens` and may return fewer tokens than wanted, or none. A session becomes known with its
    first request and is forgotten by `close`. Calls come one at a time. `blocking` says that `propose` takes long
    enough to be kept off the event loop.
    """

    blocking: bool

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """One draft per request, in order."""

    def ahead(self, requests: Sequence[tuple[DraftRequest, Draft]]) -> list[Ahead | None]:
        """Go on from drafts just proposed, each with its request and the round to draft for; None where that is not
        to be had."""

    def seen(self, session: str) -> int:
        """How many tokens of the session's states it has taken in: it needs those from the one before on. 0 if it
        reads none, or has lost what it had."""

    def close(self, session: str) -> None:
        """The session has ended."""


class WithoutStates:
    """The part of a source that reads no states and never drafts ahead."""

    def ahead(self, requests: Sequence[tuple[DraftRequest, Draft]]) -> list[Ahead | None]:
        """Nothing."""
        return [None for _ in requests]

    def seen(self, session: str) -> int:
        """Reads no states."""
        return 0


class NoDrafts(WithoutStates):
    """Plain decoding: every round brings the target's own next token."""

    blocking = False

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Empty drafts."""
        return [Draft() for _ in requests]

    def close(self, session: str) -> None:
        """Nothing to forget."""
