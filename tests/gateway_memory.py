"""A gateway's transport in memory, for tests without RabbitMQ and Redis. It passes `transport_contract`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

from shared.broker.topology import DEFAULT_POOL
from shared.errors import Unroutable
from shared.messages import Cancel, Ended, Finish, Generate, Message, Result
from shared.state.sessions import Request, Session, SessionProgress, SessionStatus, SessionTurn

Receive = Callable[[Message], Awaitable[None]]


@dataclass
class MemoryServices:
    """The services behind the gateways: stored sessions, drafters, and what they received."""

    pools: set[str] = field(default_factory=lambda: {DEFAULT_POOL})
    """Pools with a drafter."""
    draft: Receive | None = None
    """Works on a Generate, like a drafter, before `start` returns."""
    generated: list[tuple[str, Generate]] = field(default_factory=list)
    """Pool and message of each session handed to a drafter."""
    cancelled: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    sessions: dict[str, Session] = field(default_factory=dict)
    records: dict[str, bytes] = field(default_factory=dict)
    collectors: dict[str, str] = field(default_factory=dict)
    """By session, the gateway that collects it; empty for none."""
    started: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By session, its pool and the time at which its request arrived."""
    turns_s: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    """By session with a commit: its pool, and the times at which its request arrived and of the commit."""
    receivers: dict[str, Receive] = field(default_factory=dict)
    """By gateway, its handler of results."""
    bindings: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By the gateway that results are addressed to, the other gateways that receive them, one entry per collection."""
    logprobs: dict[str, bytes] = field(default_factory=lambda: defaultdict(bytes))
    """By session, the records of its log-probabilities."""
    responses: dict[str, bytes] = field(default_factory=dict)
    error: Exception | None = None
    """Raised by every call that sends a message."""

    def send(self, message: Message) -> None:
        """Take in a message of a gateway."""
        if isinstance(message, Cancel):
            self.cancelled.append(message.session)
        if self.error is not None:
            raise self.error
        if isinstance(message, Ended):
            self.ended.append(message)

    async def commit(
        self,
        session_id: str,
        tokens: Sequence[int],
        finish: Finish | None = None,
        committed_in: Sequence[str] = (),
        logprobs: bytes = b"",
    ) -> None:
        """Add committed tokens to a session."""
        self.logprobs[session_id] += logprobs
        session = self.sessions[session_id]
        status = session.status if finish is None else SessionStatus.FINISHED
        self.sessions[session_id] = replace(
            session,
            tokens=[*session.tokens, *tokens],
            finish=finish,
            status=status,
            first_ms=session.first_ms or 0.0,
            committed_in=list(committed_in),
        )
        pool, arrived_s = self.started[session_id]
        self.turns_s[session_id] = (pool, arrived_s, monotonic())

    async def publish(self, gateway: str, result: Result) -> None:
        """Send a result to `gateway` and to every other gateway that receives its results."""
        for name in {gateway, *self.bindings[gateway]} & self.receivers.keys():
            await self.receivers[name](result)


class MemoryTransport:
    """One gateway's transport over `MemoryServices`."""

    stall_reason = "nobody works on this session of pool {pool!r}"

    def __init__(self, services: MemoryServices, instance: str) -> None:
        self._services = services
        self._instance = instance

    def deliver_to(self, receive: Receive) -> None:
        """Deliver this gateway's results to `receive`."""
        self._services.receivers[self._instance] = receive

    async def start(self, generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        services = self._services
        request = Request(
            session=generate.session,
            gateway=generate.gateway,
            prompt_len=len(generate.prompt),
            sampling=generate.sampling,
            stop_ids=generate.stop_ids,
            max_tokens=generate.max_tokens,
            fingerprint=generate.fingerprint,
            slo=generate.slo,
        )
        services.sessions[generate.session] = Session(
            request, SessionStatus.ACTIVE, list(generate.prompt), -1, None, elapsed_ms=generate.elapsed_ms
        )
        services.started[generate.session] = (pool, monotonic() - generate.elapsed_ms / 1000)
        services.records[generate.session] = resume_record
        services.collectors[generate.session] = self._instance
        services.send(generate)
        if pool not in services.pools:
            raise Unroutable(f"no drafter of pool {pool!r}")
        services.generated.append((pool, generate))
        if services.draft is not None:
            await services.draft(generate)

    async def cancel(self, session_id: str, reason: str) -> None:
        services = self._services
        if services.collectors.get(session_id, self._instance) != self._instance:
            return
        session = services.sessions.get(session_id)
        if session is not None and session.status is SessionStatus.ACTIVE:
            services.sessions[session_id] = replace(session, status=SessionStatus.CANCELLED)
        services.send(Cancel(session=session_id, reason=reason))

    async def leave(self, session_id: str, length: int) -> None:
        services = self._services
        if services.collectors.get(session_id) == self._instance:
            services.collectors[session_id] = ""
            services.sessions[session_id] = replace(services.sessions[session_id], left_at=length)

    async def resume_record(self, answer_id: str) -> bytes | None:
        return self._services.records.get(answer_id) or None

    async def store_response(self, response_id: str, body: bytes) -> None:
        self._services.responses[response_id] = body

    async def stored_response(self, response_id: str) -> bytes | None:
        return self._services.responses.get(response_id)

    @asynccontextmanager
    async def collect(self, session_ids: Sequence[str]) -> AsyncIterator[list[Session | None]]:
        services = self._services
        if any(session_id not in services.sessions for session_id in session_ids):
            yield [None for _ in session_ids]
            return
        found = [services.sessions[session_id] for session_id in session_ids]
        services.collectors |= dict.fromkeys(session_ids, self._instance)
        origins = {session.request.gateway for session in found} - {self._instance}
        for origin in origins:
            services.bindings[origin].append(self._instance)
        try:
            yield list(found)
        finally:
            for origin in origins:
                services.bindings[origin].remove(self._instance)

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        session = self._services.sessions.get(session_id)
        if session is None:
            return None
        return SessionProgress(
            session.status,
            len(session.tokens),
            session.tokens[from_len:],
            session.finish,
            session.committed_in,
            self._services.logprobs[session_id],
        )

    async def turns(self) -> list[SessionTurn]:
        now = monotonic()
        return [
            SessionTurn(session_id, pool, (now - arrived_s) * 1000, (now - committed_s) * 1000)
            for session_id, (pool, arrived_s, committed_s) in self._services.turns_s.items()
            if self._services.sessions[session_id].status is SessionStatus.ACTIVE
        ]

    async def report(self, ended: Ended) -> None:
        self._services.send(ended)
