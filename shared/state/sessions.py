"""Sessions as they are stored: their requests, states and turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from shared.messages import Finish, Record, Sampling, Slo


class SessionStatus(StrEnum):
    """Durable status of a session."""

    ACTIVE = "active"
    FINISHED = "finished"
    CANCELLED = "cancelled"


class Request(Record):
    """Parameters of a session. The gateway writes them once; the verifier trusts them."""

    session: str
    gateway: str
    prompt_len: int
    sampling: Sampling
    stop_ids: list[int]
    max_tokens: int
    fingerprint: str
    slo: Slo | None = None

    @property
    def max_length(self) -> int:
        """Largest committed length of the session."""
        return self.prompt_len + self.max_tokens


@dataclass(frozen=True)
class Session:
    """State of a session: its request and every committed token."""

    request: Request
    status: SessionStatus
    tokens: list[int]
    round: int
    finish: Finish | None
    elapsed_ms: float
    """Time since the request arrived, on Redis's clock."""
    first_ms: float | None = None
    """Time from the request's arrival to the first commit."""
    idle_ms: float = 0.0
    """Time since the last commit, or since the request arrived."""
    left_at: int | None = None
    """Committed length when a gateway last released the session; None if none has."""
    committed_in: list[str] = field(default_factory=list)
    """Arithmetics of its commits, in the order of their first."""


@dataclass(frozen=True)
class SessionProgress:
    """Status and committed length of a session, and its tokens from the requested position on."""

    status: SessionStatus
    length: int
    tokens: list[int]
    finish: Finish | None
    committed_in: list[str] = field(default_factory=list)
    """Arithmetics of its commits, in the order of their first."""
    logprobs: bytes = b""
    """Records of log-probabilities of the whole session; empty unless it asks for them."""


@dataclass(frozen=True)
class SessionTurn:
    """The last commit of an active session."""

    session_id: str
    pool: str
    """Its pool of drafters."""
    age_ms: float
    """Time since the request arrived."""
    idle_ms: float
    """Time since the commit."""
