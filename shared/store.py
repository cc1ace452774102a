"""Everything that is in Redis, and the only code that touches it.

    <ns>:session:{id}     hash: the request (msgpack), status, committed length, last round, verifier that holds its K/V
    <ns>:tokens:{id}      string: committed token ids, prompt first, little-endian int32
    <ns>:deadlines        sorted set: session id by the time (Redis's clock, ms) at which its next token is due
    <ns>:verifier:{id}    the last heartbeat, expiring; the set <ns>:verifiers has their names
    <ns>:costmodel:{id}   the last cost model of a verifier, expiring; the set <ns>:costmodels has their names
    <ns>:quota:{key}, <ns>:streams:{key}    what an API key has used: see `shared.quota`

Session state expires `ttl_s` after the last commit. The commit itself is `commit.lua`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Any

import msgpack
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from shared.errors import BrokersError, MessageError
from shared.messages import CostModel, Finish, Heartbeat, Message, Record, Sampling, Slo, decode, encode
from shared.quota import Quota
from shared.tls import Tls

HEARTBEAT_TTL_MS = 3000
COSTMODEL_TTL_MS = 7 * 24 * 3600 * 1000

# A server that is restarting is waited for; one that hangs is not asked again, so that a call ends within seconds.
_RETRY = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=6, supported_errors=(RedisConnectionError,))


class SessionStatus(StrEnum):
    """Where a session stands, durably."""

    ACTIVE = "active"
    FINISHED = "finished"
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """What the commit script decided for one job."""

    COMMITTED = "committed"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"
    GONE = "gone"


class Request(Record):
    """What a session was asked for; written once by the gateway, trusted by the verifier."""

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
        """Committed length at which the session ends at the latest."""
        return self.prompt_len + self.max_tokens


@dataclass(frozen=True)
class Session:
    """A session as Redis holds it: the request and every committed token."""

    request: Request
    status: SessionStatus
    tokens: list[int]
    round: int
    finish: Finish | None
    elapsed_ms: float
    """Time since the request arrived, by Redis's own clock."""
    first_ms: float | None = None
    """Time from there to the first commit."""


@dataclass(frozen=True)
class Progress:
    """How far a session is: committed length, and the tokens from the asked position on."""

    status: SessionStatus
    length: int
    tokens: list[int]
    finish: Finish | None


@dataclass(frozen=True)
class Commit:
    """One job's verdict, to be made part of its session."""

    session: str
    round: int
    base_len: int
    accepted: int
    tokens: Sequence[int]
    finish: Finish | None
    cached: int


@dataclass(frozen=True)
class Committed:
    """The script's answer: `tokens` are what is committed from `base_len` on; `length` is the committed length."""

    outcome: Outcome
    length: int
    base_len: int
    accepted: int
    finish: Finish | None
    tokens: list[int]


class Store:
    """Redis, in one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, redis: Redis, namespace: str, ttl_s: int) -> None:
        self._redis = redis
        self._namespace = namespace
        self._ttl_s = ttl_s
        self._commit = redis.register_script(files("shared").joinpath("commit.lua").read_text())
        self.quota = Quota(redis, namespace, self._guard)

    @classmethod
    def connect(cls, url: str, namespace: str, ttl_s: int, tls: Tls | None = None) -> Store:
        """A store at this URL. Connections are opened when first needed."""
        redis = Redis.from_url(
            url,
            socket_connect_timeout=5,
            socket_timeout=5,
            retry=_RETRY,
            **(tls or Tls()).redis_options(url),
        )
        return cls(redis, namespace, ttl_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def ping(self) -> None:
        """Raise BrokersError unless Redis answers."""
        await self._guard(self._redis.ping())

    async def create(self, request: Request, prompt: Sequence[int], elapsed_ms: float = 0.0) -> None:
        """Write a new session and, with an SLO, the time at which its first token is due.

        `elapsed_ms` is the time since the request arrived. Times are kept on Redis's clock, the only one that every
        service sees.
        """
        slo = request.slo
        start_ms = await self._now_ms() - elapsed_ms
        fields: dict[Any, Any] = {
            "request": msgpack.packb(request.model_dump(mode="json")),
            "status": SessionStatus.ACTIVE.value,
            "start_ms": int(start_ms),
            "prompt_len": len(prompt),
            "length": len(prompt),
            "round": -1,
            "base": -1,
            "accepted": 0,
            "finish": "",
        }
        if slo is not None:
            fields |= {"tpot_ms": slo.tpot_ms}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._session(request.session), mapping=fields)
            pipe.set(self._tokens(request.session), _pack(prompt), ex=self._ttl_s)
            pipe.expire(self._session(request.session), self._ttl_s)
            if slo is not None:
                pipe.zadd(self._deadlines, {request.session: start_ms + slo.ttft_ms})
            await self._guard(pipe.execute())

    async def _now_ms(self) -> float:
        seconds, microseconds = await self._guard(self._redis.time())
        return float(seconds * 1000 + microseconds / 1000)

    async def read(self, sessions: Sequence[str]) -> list[Session | None]:
        """The sessions, whole, in one round trip; None for one that is gone."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.time()
            for session in sessions:
                pipe.hmget(
                    self._session(session), "request", "status", "length", "round", "finish", "start_ms", "first_ms"
                )
                pipe.get(self._tokens(session))
            (seconds, microseconds), *answers = await self._guard(pipe.execute())
        now_ms = seconds * 1000 + microseconds / 1000
        return [_session(answers[i], answers[i + 1], now_ms) for i in range(0, len(answers), 2)]

    async def progress(self, session: str, from_len: int) -> Progress | None:
        """Status, committed length and the committed tokens from position `from_len` on; None if it is gone."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(self._session(session), "status", "length", "finish")
            pipe.getrange(self._tokens(session), from_len * 4, -1)
            (status, length, finish), tokens = await self._guard(pipe.execute())
        if status is None or length is None:
            return None
        return Progress(SessionStatus(status.decode()), int(length), _unpack(tokens), _finish(finish))

    async def commit(self, verifier: str, commits: Sequence[Commit]) -> list[Committed]:
        """Commit a batch's verdicts in one round trip, each atomically. See `commit.lua` for the rules."""
        if not commits:
            return []
        keys = [self._deadlines]
        arguments: list[str | int | bytes] = [verifier, self._ttl_s]
        for c in commits:
            keys += [self._session(c.session), self._tokens(c.session)]
            arguments += [c.session, c.round, c.base_len, c.accepted, c.finish or "", c.cached, _pack(c.tokens)]
        answers = await self._guard(self._commit(keys=keys, args=arguments))
        return [
            Committed(Outcome(outcome.decode()), length, base, accepted, _finish(finish), _unpack(tokens))
            for outcome, length, base, accepted, finish, tokens in answers
        ]

    async def cancel(self, session: str) -> None:
        """No more tokens for this session, whoever still works on it. A finished session stays finished."""
        key = self._session(session)

        async def flip(pipe: Any) -> None:
            status = await pipe.hget(key, "status")
            pipe.multi()
            if status == SessionStatus.ACTIVE.value.encode():
                pipe.hset(key, "status", SessionStatus.CANCELLED.value)
            pipe.zrem(self._deadlines, session)

        await self._guard(self._redis.transaction(flip, key))

    async def deadline_ms(self, session: str) -> float | None:
        """When the session's next token is due, in milliseconds on Redis's clock; None without an SLO."""
        score: float | None = await self._guard(self._redis.zscore(self._deadlines, session))
        return score

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Keep a verifier's heartbeat for a few seconds."""
        await self._keep("verifier", heartbeat.verifier, heartbeat, HEARTBEAT_TTL_MS)

    async def silence(self, verifier: str) -> None:
        """Forget a verifier that says goodbye."""
        await self._guard(self._redis.delete(self._key("verifier", verifier)))

    async def heartbeats(self) -> list[Heartbeat]:
        """The verifiers that are alive."""
        return [m for m in await self._kept("verifier") if isinstance(m, Heartbeat)]

    async def save_cost_model(self, model: CostModel) -> None:
        """Keep the last model of a verifier, for restarted schedulers and estimators."""
        await self._keep("costmodel", model.verifier, model, COSTMODEL_TTL_MS)

    async def cost_models(self) -> list[CostModel]:
        """The last model of every verifier that was measured lately."""
        return [m for m in await self._kept("costmodel") if isinstance(m, CostModel)]

    async def _keep(self, kind: str, name: str, message: Message, ttl_ms: int) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._key(kind, name), encode(message), px=ttl_ms)
            pipe.sadd(f"{self._namespace}:{kind}s", name)
            await self._guard(pipe.execute())

    async def _kept(self, kind: str) -> list[Message]:
        names = sorted(name.decode() for name in await self._guard(self._redis.smembers(f"{self._namespace}:{kind}s")))
        if not names:
            return []
        bodies = await self._guard(self._redis.mget([self._key(kind, name) for name in names]))
        messages = []
        for body in bodies:
            # One that a newer version wrote is left to expire by itself.
            with suppress(MessageError):
                messages += [decode(body)] if body is not None else []
        expired = [name for name, body in zip(names, bodies, strict=True) if body is None]
        if expired:
            await self._guard(self._redis.srem(f"{self._namespace}:{kind}s", *expired))
        return messages

    async def _guard(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except (RedisError, OSError) as error:
            raise BrokersError(f"Redis: {error}; check WISP_REDIS_URL and that the server is up") from error

    @property
    def _deadlines(self) -> str:
        return f"{self._namespace}:deadlines"

    def _key(self, kind: str, name: str) -> str:
        return f"{self._namespace}:{kind}:{name}"

    def _session(self, session: str) -> str:
        return self._key("session", session)

    def _tokens(self, session: str) -> str:
        return self._key("tokens", session)


def _pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _unpack(body: bytes) -> list[int]:
    packed = array("i")
    packed.frombytes(body)
    return packed.tolist()


def _finish(value: bytes | None) -> Finish | None:
    return Finish(value.decode()) if value else None


def _session(fields: list[bytes | None], tokens: bytes | None, now_ms: float) -> Session | None:
    request, status, length, round_, finish, start_ms, first_ms = fields
    if request is None or status is None or length is None or round_ is None or start_ms is None or tokens is None:
        return None
    committed = _unpack(tokens)
    if len(committed) != int(length):
        return None
    try:
        parsed = Request.model_validate(msgpack.unpackb(request))
    except (ValueError, ValidationError):
        return None
    elapsed_ms = max(0.0, now_ms - float(start_ms))
    first_after_ms = None if first_ms is None else max(0.0, float(first_ms) - float(start_ms))
    return Session(
        parsed, SessionStatus(status.decode()), committed, int(round_), _finish(finish), elapsed_ms, first_after_ms
    )
