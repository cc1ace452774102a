"""A store of sessions in memory, for tests without Redis. It passes `store_contract`.

Nothing expires here, and sessions have no deadlines and no patience: no test without Redis needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

from shared.errors import Fenced
from shared.messages import Finish, Heartbeat
from shared.state.commits import Commit, CommitOutcome, Committed
from shared.state.sessions import Request, Session, SessionProgress, SessionStatus, SessionTurn


@dataclass
class MemorySession:
    """The state of a session, as Redis keeps it."""

    request: Request
    tokens: list[int]
    gateway: str
    """The gateway that collects it; empty for none."""
    pool: str
    resume_record: bytes
    start_s: float
    """When its request arrived, on `monotonic`."""
    status: SessionStatus = SessionStatus.ACTIVE
    round: int = -1
    base_len: int = -1
    accepted: int = 0
    finish: Finish | None = None
    first_s: float | None = None
    last_s: float | None = None
    left_at: int | None = None
    committed_in: list[str] = field(default_factory=list)
    logprobs: bytes = b""

    def append(self, commit: Commit, arithmetic: str) -> Committed:
        """Append the tokens of a round that builds on the committed length."""
        self.tokens += commit.tokens
        self.round, self.base_len, self.accepted = commit.round, commit.base_len, commit.accepted
        self.finish = commit.finish
        self.logprobs += commit.logprobs
        self.last_s = monotonic()
        self.first_s = self.last_s if self.first_s is None else self.first_s
        if arithmetic and arithmetic not in self.committed_in:
            self.committed_in.append(arithmetic)
        if commit.finish is not None:
            self.status = SessionStatus.FINISHED
        return self._answer(CommitOutcome.COMMITTED, commit.base_len, commit.accepted)

    def known(self, commit: Commit) -> Committed:
        """Return what a round that does not build on the committed length gets."""
        base_len = min(commit.base_len, len(self.tokens))
        if (commit.round, commit.base_len) == (self.round, self.base_len):
            return self._answer(CommitOutcome.COMMITTED, base_len, self.accepted)
        return self._answer(CommitOutcome.CONFLICT, base_len, 0)

    def _answer(self, outcome: CommitOutcome, base_len: int, accepted: int) -> Committed:
        tokens, lines = self.tokens[base_len:], list(self.committed_in)
        return Committed(outcome, len(self.tokens), base_len, accepted, self.finish, tokens, lines)


class MemoryRegistry:
    """Heartbeats and leases of verifiers."""

    def __init__(self) -> None:
        self.beats: list[Heartbeat] = []
        """All heartbeats, in their order."""
        self.leases: dict[str, int] = {}
        self._numbers = count(1)

    async def beat(self, heartbeat: Heartbeat) -> None:
        self.beats.append(heartbeat)

    async def heartbeats(self) -> list[Heartbeat]:
        last = {beat.verifier: beat for beat in self.beats}
        return [last[verifier] for verifier in sorted(last)]

    async def renew(self, verifier_id: str, lease: int) -> int:
        if self.leases.get(verifier_id) != lease:
            self.leases[verifier_id] = next(self._numbers)
        return self.leases[verifier_id]


class MemoryStore:
    """The part of `Store` that tests without Redis use."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.sessions: dict[str, MemorySession] = {}
        self.responses: dict[str, bytes] = {}
        self._cancelled_before: set[str] = set()

    async def create(
        self,
        request: Request,
        prompt: Sequence[int],
        elapsed_ms: float = 0.0,
        *,
        pool: str = "",
        resume_record: bytes = b"",
    ) -> bool:
        if request.session in self._cancelled_before:
            return False
        if request.session not in self.sessions:
            start_s = monotonic() - elapsed_ms / 1000
            self.sessions[request.session] = MemorySession(
                request, list(prompt), request.gateway, pool, resume_record, start_s
            )
        return self.sessions[request.session].status is SessionStatus.ACTIVE

    async def read(self, session_ids: Sequence[str]) -> list[Session | None]:
        return [self._read(session_id) for session_id in session_ids]

    def _read(self, session_id: str) -> Session | None:
        kept = self.sessions.get(session_id)
        if kept is None:
            return None
        now_s = monotonic()
        return Session(
            kept.request,
            kept.status,
            list(kept.tokens),
            kept.round,
            kept.finish,
            elapsed_ms=(now_s - kept.start_s) * 1000,
            first_ms=None if kept.first_s is None else (kept.first_s - kept.start_s) * 1000,
            idle_ms=(now_s - (kept.last_s or kept.start_s)) * 1000,
            left_at=kept.left_at,
            committed_in=list(kept.committed_in),
        )

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        kept = self.sessions.get(session_id)
        if kept is None:
            return None
        return SessionProgress(
            kept.status,
            len(kept.tokens),
            kept.tokens[from_len:],
            kept.finish,
            list(kept.committed_in),
            kept.logprobs,
        )

    async def commit(
        self, verifier_id: str, commits: Sequence[Commit], *, lease: int = 0, arithmetic: str = ""
    ) -> list[Committed]:
        if lease and self.registry.leases.get(verifier_id) != lease:
            raise Fenced(f"{verifier_id} does not hold lease {lease}")
        return [self._commit(commit, arithmetic) for commit in commits]

    def _commit(self, commit: Commit, arithmetic: str) -> Committed:
        kept = self.sessions.get(commit.session_id)
        if kept is None:
            return Committed(CommitOutcome.GONE, 0, commit.base_len, 0, None, [])
        if kept.status is SessionStatus.CANCELLED:
            return Committed(CommitOutcome.CANCELLED, len(kept.tokens), commit.base_len, 0, None, [])
        if kept.status is SessionStatus.ACTIVE and commit.base_len == len(kept.tokens) and commit.tokens:
            return kept.append(commit, arithmetic)
        return kept.known(commit)

    async def ended(self, session_ids: Sequence[str]) -> list[str]:
        active = {name for name, kept in self.sessions.items() if kept.status is SessionStatus.ACTIVE}
        return [session_id for session_id in session_ids if session_id not in active]

    async def turns(self) -> list[SessionTurn]:
        now_s = monotonic()
        return [
            SessionTurn(name, kept.pool, (now_s - kept.start_s) * 1000, (now_s - kept.last_s) * 1000)
            for name, kept in self.sessions.items()
            if kept.status is SessionStatus.ACTIVE and kept.pool and kept.last_s is not None
        ]

    async def cancel(self, session_id: str, gateway_id: str = "") -> bool:
        kept = self.sessions.get(session_id)
        if kept is None:
            self._cancelled_before.add(session_id)
            return True
        if gateway_id and kept.gateway != gateway_id:
            return False
        if kept.status is SessionStatus.ACTIVE:
            kept.status = SessionStatus.CANCELLED
        return True

    async def collect(self, session_id: str, gateway_id: str) -> bool:
        kept = self.sessions.get(session_id)
        if kept is None:
            return False
        kept.gateway = gateway_id
        return True

    async def leave(self, session_id: str, gateway_id: str, length: int) -> None:
        kept = self.sessions.get(session_id)
        if kept is not None and kept.gateway == gateway_id:
            kept.gateway, kept.left_at = "", length

    async def resume_record(self, session_id: str) -> bytes | None:
        kept = self.sessions.get(session_id)
        return None if kept is None else kept.resume_record or None

    async def store_response(self, response_id: str, body: bytes) -> None:
        self.responses[response_id] = body

    async def stored_response(self, response_id: str) -> bytes | None:
        return self.responses.get(response_id)
