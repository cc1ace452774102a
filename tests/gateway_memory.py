"""A gateway's transport in memory, for tests without RabbitMQ and Redis. It passes `transport_contract`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from memory_store import MemoryStore

from shared.broker.topology import DEFAULT_POOL
from shared.errors import Unroutable
from shared.messages import Cancel, Ended, Finish, Generate, Message, Result
from shared.state.commits import Commit
from shared.state.sessions import Request, Session, SessionProgress, SessionTurn

Receive = Callable[[Message], Awaitable[None]]


@dataclass
class MemoryServices:
    """The services behind the gateways: the store, drafters, and what they received."""

    store: MemoryStore = field(default_factory=MemoryStore)
    pools: set[str] = field(default_factory=lambda: {DEFAULT_POOL})
    """Pools with a drafter."""
    draft: Receive | None = None
    """Works on a Generate, like a drafter, before `start` returns."""
    generated: list[tuple[str, Generate]] = field(default_factory=list)
    """Pool and message of each session handed to a drafter."""
    cancelled: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    receivers: dict[str, Receive] = field(default_factory=dict)
    """By gateway, its handler of results."""
    bindings: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By the gateway that results are addressed to, the other gateways that receive them, one entry per collection."""
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
        """Add committed tokens to a session. The last arithmetic of `committed_in` is theirs."""
        session = self.store.sessions[session_id]
        commit = Commit(
            session_id, session.round + 1, len(session.tokens), len(tokens) - 1, tokens, finish, 0, logprobs
        )
        await self.store.commit("v1", [commit], arithmetic=committed_in[-1] if committed_in else "")

    async def publish(self, gateway: str, result: Result) -> None:
        """Send a result to `gateway` and to every other gateway that receives its results."""
        for name in {gateway, *self.bindings[gateway]} & self.receivers.keys():
            await self.receivers[name](result)


class MemoryTransport:
    """One gateway's transport over `MemoryServices`."""

    stall_reason = "nobody works on this session of pool {pool!r}"

    def __init__(self, services: MemoryServices, instance: str) -> None:
        self._services = services
        self._store = services.store
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
        if not await self._store.create(
            request, generate.prompt, generate.elapsed_ms, pool=pool, resume_record=resume_record
        ):
            return
        services.send(generate)
        if pool not in services.pools:
            raise Unroutable(f"no drafter of pool {pool!r}")
        services.generated.append((pool, generate))
        if services.draft is not None:
            await services.draft(generate)

    async def cancel(self, session_id: str, reason: str) -> None:
        if await self._store.cancel(session_id, self._instance):
            self._services.send(Cancel(session=session_id, reason=reason))

    async def leave(self, session_id: str, length: int) -> None:
        await self._store.leave(session_id, self._instance, length)

    async def resume_record(self, answer_id: str) -> bytes | None:
        return await self._store.resume_record(answer_id)

    async def store_response(self, response_id: str, body: bytes) -> None:
        await self._store.store_response(response_id, body)

    async def stored_response(self, response_id: str) -> bytes | None:
        return await self._store.stored_response(response_id)

    @asynccontextmanager
    async def collect(self, session_ids: Sequence[str]) -> AsyncIterator[list[Session | None]]:
        if not all([await self._store.collect(session_id, self._instance) for session_id in session_ids]):
            yield [None for _ in session_ids]
            return
        bindings = self._services.bindings
        found = await self._store.read(session_ids)
        origins = {session.request.gateway for session in found if session is not None} - {self._instance}
        for origin in origins:
            bindings[origin].append(self._instance)
        try:
            yield found
        finally:
            for origin in origins:
                bindings[origin].remove(self._instance)

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        return await self._store.progress(session_id, from_len)

    async def turns(self) -> list[SessionTurn]:
        return await self._store.turns()

    async def report(self, ended: Ended) -> None:
        self._services.send(ended)
