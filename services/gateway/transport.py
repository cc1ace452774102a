"""Transport of sessions: their messages (RabbitMQ) and their state (Redis) behind one narrow interface.

The baseline has a transport of its own (`services.baseline.client`), and the tests one in memory. All of them pass the
same contract, `tests/transport_contract.py`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from time import monotonic
from typing import Protocol

from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import Queue
from shared.errors import BrokersError
from shared.messages import Cancel, Ended, Generate
from shared.runtime import logging, tracing
from shared.runtime.service import BackgroundTasks
from shared.state.sessions import Request, Session, SessionProgress, SessionTurn
from shared.state.store import Store

CREATE_RETRY_S = 0.25
LONGEST_TRY_S = 3.0
"""Longest time that counts for one attempt to store a new session: the rest was a pause of this process."""
STORE_TRIES, STORE_RETRY_S = 60, 1.0
"""Retries while Redis is away. `Store.reap` ends the sessions of a gateway that stops before Redis is back."""


class Transport(Protocol):
    """Carries sessions to the services that generate their tokens.

    Results come back through `Sessions.receive`. Every method raises BrokersError when RabbitMQ or Redis cannot be
    reached, except for `cancel` and `leave`, which retry.
    """

    stall_reason: str
    """The probable reason why a session makes no progress, for its client. `{pool!r}` is the session's pool."""

    async def start(self, generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        """Create a session and hand it to the drafters of a pool. A session that was cancelled before stays cancelled.

        `resume_record` is stored with the session. Raises Unroutable when the pool has no queue, because neither a
        drafter nor a scheduler serves it.
        """

    async def cancel(self, session_id: str, reason: str) -> None:
        """End a session wherever it is worked on, unless another gateway has collected it."""

    async def leave(self, session_id: str, length: int) -> None:
        """Stop collecting a session of which `length` tokens are known, so that another gateway can collect it."""

    async def resume_record(self, answer_id: str) -> bytes | None:
        """Return the resume record of an answer; None if there is none."""

    async def store_response(self, response_id: str, body: bytes) -> None:
        """Store what a later request needs of a response, for as long as the state of a session."""

    async def stored_response(self, response_id: str) -> bytes | None:
        """Return what was stored for a response; None if there is nothing, or no longer."""

    def collect(self, session_ids: Sequence[str]) -> AbstractAsyncContextManager[list[Session | None]]:
        """Take over sessions from the gateways that collect them, and receive their results during the context.

        Gives the stored sessions, with None in place of one that is gone.
        """

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        """Return the state of a session and its committed tokens from `from_len` on; None if it is gone."""

    async def turns(self) -> list[SessionTurn]:
        """Return the last turns of all gateways' active sessions."""

    async def report(self, ended: Ended) -> None:
        """Announce the end of a session."""


class BrokerTransport:
    """Sessions over RabbitMQ, with their state in Redis."""

    stall_reason = "no drafter of pool {pool!r} or no verifier works on this session"

    def __init__(
        self,
        broker: Broker,
        store: Store,
        instance: str,
        queue: Queue,
        *,
        patience_ms: int,
        outage_wait_s: float = 0.0,
        session_keys: SessionKeys | None = None,
    ) -> None:
        """Results for this gateway arrive in `queue`.

        A session that no gateway collects for `patience_ms` is cancelled. A new session waits up to `outage_wait_s` for
        Redis.
        """
        self._broker = broker
        self._store = store
        self._instance = instance
        self._queue = queue
        self._patience_ms = patience_ms
        self._outage_wait_s = outage_wait_s
        self._session_keys = session_keys or SessionKeys(None)
        self._origins: Counter[str] = Counter()
        """Collected sessions by the gateway that started them. The results of these gateways come here as well."""
        self._tasks = BackgroundTasks()
        self._log = logging.get()

    async def start(self, generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        """See `Transport`."""
        received_s = monotonic() - generate.elapsed_ms / 1000
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
        if not await self._create(request, generate.prompt, received_s, pool, resume_record):
            self._log.info("session cancelled before it was created", session=generate.session)
            return
        generate = generate.model_copy(update={"elapsed_ms": (monotonic() - received_s) * 1000})
        await self._broker.publish(
            self._session_keys.add_to(generate),
            topology.generate(pool),
            persistent=True,
            trace=tracing.current().headers,
        )

    async def _create(
        self, request: Request, prompt: Sequence[int], received_s: float, pool: str, resume_record: bytes
    ) -> bool:
        """Store a new session; return False if it was cancelled before.

        If Redis does not answer, try again for a while: it may be a pause of the machine. Storing it twice does no
        harm.
        """
        spent_s = 0.0
        while True:
            tried_s = monotonic()
            elapsed_ms = (tried_s - received_s) * 1000
            try:
                return await self._store.create(
                    request, prompt, elapsed_ms, pool=pool, patience_ms=self._patience_ms, resume_record=resume_record
                )
            except BrokersError as error:
                spent_s += min(monotonic() - tried_s, LONGEST_TRY_S) + CREATE_RETRY_S
                if spent_s > self._outage_wait_s:
                    raise
                self._log.warning("session not stored yet", session=request.session, error=str(error))
            await asyncio.sleep(CREATE_RETRY_S)

    async def cancel(self, session_id: str, reason: str) -> None:
        """See `Transport`."""
        message = Cancel(session=session_id, reason=reason)
        mark = partial(self._store.cancel, session_id, self._instance)
        try:
            if not await mark():
                self._log.info("session is collected by another gateway", session=session_id)
                return
        except BrokersError:
            # The services that work on the session need not wait for Redis.
            await self._broker.publish(message, topology.CANCEL)
            await self._until_stored(mark, session_id)
            return
        await self._broker.publish(message, topology.CANCEL)

    async def leave(self, session_id: str, length: int) -> None:
        """See `Transport`."""
        await self._until_stored(partial(self._store.leave, session_id, self._instance, length), session_id)

    async def resume_record(self, answer_id: str) -> bytes | None:
        """See `Transport`."""
        return await self._store.resume_record(answer_id)

    async def store_response(self, response_id: str, body: bytes) -> None:
        """See `Transport`."""
        await self._store.store_response(response_id, body)

    async def stored_response(self, response_id: str) -> bytes | None:
        """See `Transport`."""
        return await self._store.stored_response(response_id)

    @asynccontextmanager
    async def collect(self, session_ids: Sequence[str]) -> AsyncIterator[list[Session | None]]:
        """See `Transport`."""
        if not all([await self._store.collect(session_id, self._instance) for session_id in session_ids]):
            yield [None for _ in session_ids]
            return
        found = await self._store.read(session_ids)
        origins = {session.request.gateway for session in found if session is not None} - {self._instance}
        self._origins.update(origins)
        try:
            # Rounds in flight, and a drafter that has the first Generate, still send their results to the origin.
            for origin in origins:
                await self._broker.bind(self._queue, topology.result(origin))
            yield await self._store.read(session_ids)
        finally:
            self._origins.subtract(origins)
            for origin in origins:
                if not self._origins[origin]:
                    self._tasks.spawn(self._unbind(origin))

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        """See `Transport`."""
        return await self._store.progress(session_id, from_len)

    async def turns(self) -> list[SessionTurn]:
        """See `Transport`."""
        return await self._store.turns()

    async def report(self, ended: Ended) -> None:
        """See `Transport`."""
        await self._broker.publish(ended, topology.ENDED)

    async def _until_stored(self, write: Callable[[], Awaitable[object]], session_id: str) -> None:
        for _ in range(STORE_TRIES):
            try:
                await write()
                return
            except BrokersError as error:
                self._log.warning("session's end not stored yet", session=session_id, error=str(error))
            await asyncio.sleep(STORE_RETRY_S)

    async def _unbind(self, origin: str) -> None:
        if self._origins[origin]:
            return
        del self._origins[origin]
        try:
            await self._broker.unbind(self._queue, topology.result(origin))
        except BrokersError as error:
            self._log.warning("still receiving another gateway's results", gateway=origin, error=str(error))
