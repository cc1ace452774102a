"""Sessions in Redis: their requests and committed tokens. Only this package touches Redis.

    <ns>:session:{id}     hash: the request (msgpack), status, committed length, last round, the verifier that holds its
                          KV, the arithmetics of its commits (lines), the gateway that collects it (none:
                          ""), the gateway's resume record, its pool of drafters
    <ns>:tokens:{id}      string: committed token ids, prompt first, little-endian int32
    <ns>:logprobs:{id}    string: records of log-probabilities, where the session asks for them: of all committed tokens
                          but the first, or of the output only
    <ns>:deadlines        sorted set of the active sessions by the time (Redis's clock, ms) at which their next token is
                          due; inf without an SLO
    <ns>:response:{id}    string: what the gateway keeps of a response, for requests that continue it
    <ns>:verifier:{id}, <ns>:lease:{id}, <ns>:costmodel:{id}, <ns>:gateway:{id}     see `shared.state.registry`
    <ns>:kv:{kind}:{hex}, <ns>:kvs:{kind}   KV blocks that verifiers hand over: see `shared.state.kv`
    <ns>:quota:{key}, <ns>:streams:{key}    usage of an API key: see `shared.state.quota`

The state of a session expires `ttl_s` after its last commit. The commit itself is `commit.lua`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import msgpack
from pydantic import ValidationError

from shared.errors import Fenced
from shared.messages import (
    MOST,
    Finish,
)
from shared.runtime.tls import Tls
from shared.state.commits import SESSION_TTL_S, Commit, CommitOutcome, Committed
from shared.state.connection import RedisConnection
from shared.state.kv import KvBlocks
from shared.state.quota import Quota
from shared.state.registry import Registry
from shared.state.sessions import Request, Session, SessionProgress, SessionStatus, SessionTurn

MARK_S = 300
"""Seconds that the mark of a session that was cancelled before it existed stays: longer than any creation takes."""
SESSIONS_AT_ONCE = 200
"""Sessions per step of `reap` and `turns`. A larger step would delay other calls to Redis."""

FIELDS = (
    "request",
    "status",
    "length",
    "round",
    "finish",
    "start_ms",
    "first_ms",
    "last_ms",
    "left_at",
    "committed_in",
)
"""Fields that `read` gets of a session, in this order."""


class Store:
    """Sessions of one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, connection: RedisConnection, ttl_s: int = SESSION_TTL_S) -> None:
        """ttl_s: lifetime of a session's state after its last commit, for processes that create or commit sessions."""
        self._connection = connection
        self._redis = connection.redis
        self._call = connection.call
        self._ttl_s = ttl_s
        self._commit, self._create, self._cancel = (
            self._redis.register_script(files("shared.state").joinpath(f"{name}.lua").read_text())
            for name in ("commit", "create", "cancel")
        )
        self.registry = Registry(connection)
        self.quota = Quota(connection)
        self.kv = KvBlocks(connection)

    @classmethod
    def connect(cls, url: str, namespace: str, ttl_s: int = SESSION_TTL_S, tls: Tls | None = None) -> Store:
        """Return the store at this URL. Connections open on first use."""
        return cls(RedisConnection.to(url, namespace, tls), ttl_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def refuse_cluster(self) -> None:
        """Raise BrokersError if the server belongs to a Redis Cluster. Passes while it does not answer."""
        await self._connection.refuse_cluster()

    async def ping(self) -> None:
        """Raise BrokersError unless Redis answers."""
        await self._connection.ping()

    async def create(
        self,
        request: Request,
        prompt: Sequence[int],
        elapsed_ms: float = 0.0,
        *,
        pool: str = "",
        patience_ms: int = 0,
        resume_record: bytes = b"",
    ) -> bool:
        """Write a new session and the deadline of its first token. Return False if it was cancelled before.

        `elapsed_ms` is the time since the request arrived; times are stored on Redis's clock. A session that no live
        gateway collects for `patience_ms` is cancelled by its next commit or by `reap`; 0 disables this. `pool` is the
        session's pool of drafters, for `turns`.
        """
        slo = request.slo
        fields: dict[str, str | int | float | bytes] = {
            "request": msgpack.packb(request.model_dump(mode="json")),
            "prompt_len": len(prompt),
            "length": len(prompt),
            "round": -1,
            "base": -1,
            "accepted": 0,
            "finish": "",
            "gateway": request.gateway,
            "patience_ms": patience_ms,
            "kept": resume_record,
            "pool": pool,
        }
        if slo is not None:
            fields |= {"tpot_ms": slo.tpot_ms}
        keys = [self._session(request.session), self._tokens(request.session), self._deadlines]
        ttft_ms = "" if slo is None else slo.ttft_ms
        arguments: list[str | int | float | bytes] = [
            request.session,
            self._ttl_s,
            _pack(prompt),
            elapsed_ms,
            ttft_ms,
        ]
        arguments += [part for field in fields.items() for part in field]
        return bool(await self._call(self._create(keys=keys, args=arguments)))

    async def read(self, session_ids: Sequence[str]) -> list[Session | None]:
        """Return the sessions, in one round trip; None for one that does not exist."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.time()
            for session_id in session_ids:
                pipe.hmget(self._session(session_id), *FIELDS)
                pipe.get(self._tokens(session_id))
            (seconds, microseconds), *answers = await self._call(pipe.execute())
        now_ms = seconds * 1000 + microseconds / 1000
        return [_session(answers[i], answers[i + 1], now_ms) for i in range(0, len(answers), 2)]

    async def progress(self, session_id: str, from_len: int) -> SessionProgress | None:
        """Return a session's progress with its tokens from position `from_len` on; None if it does not exist."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(self._session(session_id), "status", "length", "finish", "committed_in")
            pipe.getrange(self._tokens(session_id), from_len * 4, -1)
            pipe.get(self._logprobs(session_id))
            (status, length, finish, committed_in), tokens, logprobs = await self._call(pipe.execute())
        if status is None or length is None:
            return None
        return SessionProgress(
            SessionStatus(status.decode()),
            int(length),
            unpack(tokens),
            _finish(finish),
            _lines(committed_in),
            logprobs or b"",
        )

    async def commit(
        self, verifier_id: str, commits: Sequence[Commit], *, lease: int = 0, arithmetic: str = ""
    ) -> list[Committed]:
        """Commit the rounds of a batch in one round trip, each atomically. `commit.lua` has the rules.

        `arithmetic` is the one in which the verifier has computed the tokens; empty if unknown.
        Raises Fenced, and commits nothing, if the verifier no longer holds `lease`; 0 skips this check.
        """
        if not commits and not lease:
            return []
        keys = [self._deadlines, self._connection.key("lease", verifier_id)]
        arguments: list[str | int | bytes] = [
            verifier_id,
            self._ttl_s,
            self._connection.key("gateway", ""),
            lease,
            arithmetic,
        ]
        for c in commits:
            keys += [self._session(c.session_id), self._tokens(c.session_id), self._logprobs(c.session_id)]
            tokens = _pack(c.tokens)
            arguments += [c.session_id, c.round, c.base_len, c.accepted, c.finish or "", c.cached, tokens, c.logprobs]
        answers = await self._call(self._commit(keys=keys, args=arguments))
        if answers is None:
            raise Fenced(f"{verifier_id} was away for too long: its lease {lease} has expired")
        return [
            Committed(
                CommitOutcome(outcome.decode()),
                length,
                base,
                accepted,
                _finish(finish),
                unpack(tokens),
                _lines(committed_in),
            )
            for outcome, length, base, accepted, finish, tokens, committed_in in answers
        ]

    async def ended(self, session_ids: Sequence[str]) -> list[str]:
        """Return the sessions that accept no more tokens: finished, cancelled or nonexistent."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for session_id in session_ids:
                pipe.hget(self._session(session_id), "status")
            found = await self._call(pipe.execute())
        active = SessionStatus.ACTIVE.value.encode()
        return [session_id for session_id, status in zip(session_ids, found, strict=True) if status != active]

    async def reap(self) -> list[str]:
        """Cancel sessions that no gateway has collected within their patience; drop deadlines of nonexistent ones.

        A session in progress is cancelled by its next commit; this is for sessions without commits. Returns the ids of
        the sessions that ended.
        """
        reaped: list[str] = []
        cursor = -1
        while cursor:
            cursor, found = await self._call(self._redis.zscan(self._deadlines, max(0, cursor), count=SESSIONS_AT_ONCE))
            names = [name.decode() for name, _ in found]
            # With a length that no session has, so that nothing is committed and no tokens are returned.
            answers = await self.commit("", [Commit(name, 0, MOST, 0, (), None, 0) for name in names])
            over = (CommitOutcome.GONE, CommitOutcome.CANCELLED)
            ended = [n for n, a in zip(names, answers, strict=True) if a.outcome in over or a.finish is not None]
            if ended:
                await self._call(self._redis.zrem(self._deadlines, *ended))
            reaped += ended
        return reaped

    async def turns(self) -> list[SessionTurn]:
        """Return the last commit of each active session that has one and names its pool."""
        found: list[SessionTurn] = []
        cursor = -1
        while cursor:
            cursor, members = await self._call(
                self._redis.zscan(self._deadlines, max(0, cursor), count=SESSIONS_AT_ONCE)
            )
            names = [name.decode() for name, _ in members]
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.time()
                for name in names:
                    pipe.hmget(self._session(name), "pool", "start_ms", "last_ms")
                (seconds, microseconds), *answers = await self._call(pipe.execute())
            now_ms = seconds * 1000 + microseconds / 1000
            found += [
                SessionTurn(name, pool.decode(), now_ms - float(start_ms), now_ms - float(last_ms))
                for name, (pool, start_ms, last_ms) in zip(names, answers, strict=True)
                if pool and start_ms and last_ms
            ]
        return found

    async def cancel(self, session_id: str, gateway_id: str = "") -> bool:
        """Cancel a session, so that it accepts no more tokens, even if it is created only after this.

        A finished session stays finished. With a `gateway_id`, a session that another gateway collects now stays as it
        is. Returns whether the session was this gateway's to cancel.
        """
        keys = [self._session(session_id), self._deadlines]
        return bool(await self._call(self._cancel(keys=keys, args=[session_id, gateway_id, MARK_S])))

    async def collect(self, session_id: str, gateway_id: str) -> bool:
        """Make this gateway the one that collects and may cancel the session; return whether the session exists."""
        return await self._hand_over(session_id, None, gateway_id)

    async def leave(self, session_id: str, gateway_id: str, length: int) -> None:
        """Release a session that this gateway collects, with `length` tokens known to it.

        Unless another gateway collects the session within its patience, it is cancelled.
        """
        await self._hand_over(session_id, gateway_id, "", {"left_at": length})

    async def _hand_over(
        self, session_id: str, owner: str | None, to: str, more: Mapping[str, int] | None = None
    ) -> bool:
        key = self._session(session_id)
        exists = False

        async def flip(pipe: Any) -> None:
            nonlocal exists
            collector = await pipe.hget(key, "gateway")
            exists = collector is not None
            pipe.multi()
            if exists and (owner is None or collector.decode() == owner):
                pipe.hset(key, mapping={"gateway": to, **(more or {})})
                if to:
                    pipe.hdel(key, "alone_ms")  # restart its patience

        await self._call(self._redis.transaction(flip, key))
        return exists

    async def resume_record(self, session_id: str) -> bytes | None:
        """Return the resume record given to `create`; None if it was empty or the session does not exist."""
        found: bytes | None = await self._call(self._redis.hget(self._session(session_id), "kept"))
        return found or None

    async def store_response(self, response_id: str, body: bytes) -> None:
        """Store what a gateway needs to continue a response, for `ttl_s`."""
        await self._call(self._redis.set(self._connection.key("response", response_id), body, ex=self._ttl_s))

    async def stored_response(self, response_id: str) -> bytes | None:
        """Return what was stored for a response; None if there is nothing, or no longer."""
        found: bytes | None = await self._call(self._redis.get(self._connection.key("response", response_id)))
        return found

    async def deadline_ms(self, session_id: str) -> float | None:
        """Return the deadline of the session's next token, in milliseconds on Redis's clock; None without an SLO."""
        score: float | None = await self._call(self._redis.zscore(self._deadlines, session_id))
        return None if score == math.inf else score

    @property
    def _deadlines(self) -> str:
        return self._connection.key("deadlines")

    def _session(self, session_id: str) -> str:
        return self._connection.key("session", session_id)

    def _tokens(self, session_id: str) -> str:
        return self._connection.key("tokens", session_id)

    def _logprobs(self, session_id: str) -> str:
        return self._connection.key("logprobs", session_id)


def _pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def unpack(body: bytes) -> list[int]:
    """Return the token ids in these bytes of a session's committed tokens."""
    packed = array("i")
    packed.frombytes(body)
    return packed.tolist()


def _finish(value: bytes | None) -> Finish | None:
    return Finish(value.decode()) if value else None


def _lines(value: bytes | None) -> list[str]:
    return value.decode().split("\n") if value else []


def _session(fields: list[bytes | None], tokens: bytes | None, now_ms: float) -> Session | None:
    request, status, length, round_, finish, start_ms, first_ms, last_ms, left_at, committed_in = fields
    if request is None or status is None or length is None or round_ is None or start_ms is None or tokens is None:
        return None
    committed = unpack(tokens)
    if len(committed) != int(length):
        return None
    try:
        parsed = Request.model_validate(msgpack.unpackb(request))
    except (ValueError, ValidationError):
        return None
    elapsed_ms = max(0.0, now_ms - float(start_ms))
    first_after_ms = None if first_ms is None else max(0.0, float(first_ms) - float(start_ms))
    return Session(
        parsed,
        SessionStatus(status.decode()),
        committed,
        int(round_),
        _finish(finish),
        elapsed_ms,
        first_after_ms,
        max(0.0, now_ms - float(last_ms or start_ms)),
        None if left_at is None else int(left_at),
        _lines(committed_in),
    )
