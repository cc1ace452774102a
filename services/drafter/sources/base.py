"""The interface of draft sources, and the one that never drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared.messages import Sampling


@dataclass(frozen=True)
class DraftRequest:
    """A session that wants a draft of at most `length` tokens after its committed `tokens`."""

    session: str
    tokens: Sequence[int]
    length: int
    sampling: Sampling


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, each with its predicted acceptance given that those before it are accepted."""

    tokens: list[int] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)


class DraftSource(Protocol):
    """Guesses tokens for many sessions at once.

    `propose` never changes `tokens` and may return fewer tokens than asked, or none. A session becomes known with its
    first request and is forgotten by `close`. Calls come one at a time. `blocking` says that `propose` takes long
    enough to be kept off the event loop.
    """

    name: str
    blocking: bool

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """One draft per request, in order."""

    def learn(self, session: str, drafted: int, accepted: int) -> None:
        """How much of the session's last draft was accepted."""

    def close(self, session: str) -> None:
        """The session has ended."""


class NoDrafts:
    """Plain decoding: every round brings the target's own next token."""

    name = "none"
    blocking = False

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Empty drafts."""
        return [Draft() for _ in requests]

    def learn(self, session: str, drafted: int, accepted: int) -> None:
        """Nothing to learn."""

    def close(self, session: str) -> None:
        """Nothing to forget."""
