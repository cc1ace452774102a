"""Records of the commit: the verifier's request, and the script's decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from shared.messages import Finish

SESSION_TTL_S = 900
"""Usual time that a session's state stays in Redis after its last token."""


class CommitOutcome(StrEnum):
    """Decision of the commit script for one job."""

    COMMITTED = "committed"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"
    GONE = "gone"


@dataclass(frozen=True)
class Commit:
    """Tokens of one job to append to its session."""

    session_id: str
    round: int
    base_len: int
    accepted: int
    tokens: Sequence[int]
    finish: Finish | None
    cached: int
    logprobs: bytes = b""
    """Records of the log-probabilities to keep for the session; see `shared.messages.logprobs`."""


@dataclass(frozen=True)
class Committed:
    """Answer of the commit script: the committed `tokens` from `base_len` on, and the committed `length`."""

    outcome: CommitOutcome
    length: int
    base_len: int
    accepted: int
    finish: Finish | None
    tokens: list[int]
    committed_in: list[str] = field(default_factory=list)
    """Arithmetics of the session's commits so far, in the order of their first."""

    @property
    def ended(self) -> bool:
        """True if the session takes no more tokens."""
        return self.finish is not None or self.outcome in (CommitOutcome.CANCELLED, CommitOutcome.GONE)
