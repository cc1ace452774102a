"""Everything that is in Redis, and the only code that touches it.

    <ns>:session:{id}     hash: the request (msgpack), status, committed length, last round, verifier that holds its
                          K/V, gateway that collects it (none: ""), what another gateway needs to go on with its answer
    <ns>:tokens:{id}      string: committed token ids, prompt first, little-endian int32
    <ns>:deadlines        sorted set of the active sessions by the time (Redis's clock, ms) at which their next token is
                          due; inf without an SLO
    <ns>:gateway:{id}     there while this gateway is
    <ns>:lease:{id}       a verifier's lease, expiring unless it is renewed
    <ns>:verifier:{id}    the last heartbeat, expiring; the set <ns>:verifiers has their names
    <ns>:kv:{kind}:{hex}, <ns>:kvs:{kind}   K/V that verifiers hand over: see `shared.state.kv`
    <ns>:costmodel:{id}   the last cost model of a verifier, expiring; the set <ns>:costmodels has their names
    <ns>:quota:{key}, <ns>:streams:{key}    what an API key has used: see `shared.state.quota`

Session state expires `ttl_s` after the last commit. The commit itself is `commit.lua`.

A verifier commits under a lease: a number that it holds as long as it renews it in time. One that was frozen or cut off
for longer gets a new one, and nothing that it was given under the old one is committed: its sessions are with others
by then.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from secrets import randbelow
from typing import Any

import msgpack
from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from shared.errors import BrokersError, Fenced, MessageError
from shared.messages import (
    MOST,
    SILENT_MS,
    CostModel,
    Finish,
    Heartbeat,
    Message,
    Record,
    Sampling,
    Slo,
    decode,
    encode,
)
from shared.runtime.tls import Tls
from shared.state.commits import SESSION_TTL_S, Commit, CommitOutcome, Committed
from shared.state.kv import KvBlocks
from shared.state.quota import Quota
from shared.state.redis_calls import now_ms

HEARTBEAT_TTL_MS = 3000
GATEWAY_TTL_MS = 5000
"""A gateway that has not said for so long that it is there collects nothing."""
COSTMODEL_TTL_MS = 7 * 24 * 3600 * 1000

_RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return 1
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 0
"""

CONNECTIONS = 32
CONNECTION_S = 30.0
"""A burst of calls waits for one of so many connections, for so long; more of them would not make Redis faster."""

REAPED_AT_ONCE = 200
"""Sessions that are looked at while nobody else is served."""

FIELDS = ("request", "status", "length", "round", "finish", "start_ms", "first_ms", "last_ms", "left_at")
"""What is read of a session, in this order."""

# A server that is restarting is waited for; one that hangs is not asked again, so that a call ends within seconds.
_RETRY = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=6, supported_errors=(RedisConnectionError,))


class SessionStatus(StrEnum):
    """Where a session stands, durably."""

    ACTIVE = "active"
    FINISHED = "finished"
    CANCELLED = "cancelled"


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
    idle_ms: float = 0.0
    """Time since the last commit, or since the request arrived."""
    left_at: int | None = None
    """Its length when a gateway left it to others last; None if none has."""


@dataclass(frozen=True)
class Progress:
    """How far a session is: committed length, and the tokens from the asked position on."""

    status: SessionStatus
    length: int
    tokens: list[int]
    finish: Finish | None


class Store:
    """Redis, in one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, redis: Redis, namespace: str, ttl_s: int) -> None:
        self._redis = redis
        self._namespace = namespace
        self._ttl_s = ttl_s
        self._commit = redis.register_script(files("shared.state").joinpath("commit.lua").read_text())
        self._renew = redis.register_script(_RENEW)
        self.quota = Quota(redis, namespace, self._guard)
        self.kv = KvBlocks(redis, namespace, self._guard)

    @classmethod
    def connect(cls, url: str, namespace: str, ttl_s: int = SESSION_TTL_S, tls: Tls | None = None) -> Store:
        """A store at this URL. Connections are opened when first needed."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=CONNECTION_S,
            socket_connect_timeout=5,
            socket_timeout=5,
            retry=_RETRY,
            **(tls or Tls()).redis_options(url),
        )
        return cls(Redis.from_pool(pool), namespace, ttl_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def ping(self) -> None:
        """Raise BrokersError unless Redis answers."""
        await self._guard(self._redis.ping())

    async def create(
        self,
        request: Request,
        prompt: Sequence[int],
        elapsed_ms: float = 0.0,
        *,
        patience_ms: int = 0,
        kept: bytes = b"",
    ) -> None:
        """Write a new session and the time at which its first token is due.

        `elapsed_ms` is the time since the request arrived. Times are kept on Redis's clock, the only one that every
        service sees. A session that no living gateway collects for `patience_ms` is cancelled with its next commit, or
        by `reap`; 0 never is. `kept` is what a gateway has to know to go on with the answer, see `kept`.
        """
        slo = request.slo
        start_ms = await now_ms(self._redis, self._guard) - elapsed_ms
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
            "gateway": request.gateway,
            "patience_ms": patience_ms,
            "kept": kept,
        }
        if slo is not None:
            fields |= {"tpot_ms": slo.tpot_ms}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._session(request.session), mapping=fields)
            pipe.set(self._tokens(request.session), _pack(prompt), ex=self._ttl_s)
            pipe.expire(self._session(request.session), self._ttl_s)
            due_ms = math.inf if slo is None else start_ms + slo.ttft_ms
            pipe.zadd(self._deadlines, {request.session: due_ms})
            await self._guard(pipe.execute())

    async def read(self, sessions: Sequence[str]) -> list[Session | None]:
        """The sessions, whole, in one round trip; None for one that is gone."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.time()
            for session in sessions:
                pipe.hmget(self._session(session), *FIELDS)
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
        return Progress(SessionStatus(status.decode()), int(length), unpack(tokens), _finish(finish))

    async def renew(self, verifier: str, lease: int) -> int:
        """The verifier's lease for the next `SILENT_MS`: this one if it still holds it, else a new one."""
        new = 1 + randbelow(2**53)
        keys, arguments = [self._key("lease", verifier)], [lease, new, SILENT_MS]
        return lease if await self._guard(self._renew(keys=keys, args=arguments)) else new

    async def commit(self, verifier: str, commits: Sequence[Commit], *, lease: int = 0) -> list[Committed]:
        """Commit a batch's verdicts in one round trip, each atomically. See `commit.lua` for the rules.

        Raises Fenced, and commits nothing, if the verifier does not hold this lease any more; 0 is not looked at.
        """
        if not commits and not lease:
            return []
        keys = [self._deadlines, self._key("lease", verifier)]
        arguments: list[str | int | bytes] = [verifier, self._ttl_s, self._key("gateway", ""), lease]
        for c in commits:
            keys += [self._session(c.session), self._tokens(c.session)]
            arguments += [c.session, c.round, c.base_len, c.accepted, c.finish or "", c.cached, _pack(c.tokens)]
        answers = await self._guard(self._commit(keys=keys, args=arguments))
        if answers is None:
            raise Fenced(f"{verifier} was away for too long: its lease {lease} has ended")
        return [
            Committed(CommitOutcome(outcome.decode()), length, base, accepted, _finish(finish), unpack(tokens))
            for outcome, length, base, accepted, finish, tokens in answers
        ]

    async def ended(self, sessions: Sequence[str]) -> list[str]:
        """Those of these sessions that take no more tokens: finished, cancelled or gone."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for session in sessions:
                pipe.hget(self._session(session), "status")
            found = await self._guard(pipe.execute())
        active = SessionStatus.ACTIVE.value.encode()
        return [session for session, status in zip(sessions, found, strict=True) if status != active]

    async def reap(self) -> list[str]:
        """Cancel sessions that nobody has collected in their patience, and forget deadlines of those that are gone.

        A session that is worked on comes to the same end with its next commit; this is for those that nobody works on.
        Returns their names.
        """
        reaped: list[str] = []
        cursor = -1
        while cursor:
            cursor, found = await self._guard(self._redis.zscan(self._deadlines, max(0, cursor), count=REAPED_AT_ONCE))
            names = [name.decode() for name, _ in found]
            # Of a length that no session has: nothing is committed, and no tokens are told.
            answers = await self.commit("", [Commit(name, 0, MOST, 0, (), None, 0) for name in names])
            over = (CommitOutcome.GONE, CommitOutcome.CANCELLED)
            ended = [n for n, a in zip(names, answers, strict=True) if a.outcome in over or a.finish is not None]
            if ended:
                await self._guard(self._redis.zrem(self._deadlines, *ended))
            reaped += ended
        return reaped

    async def cancel(self, session: str, gateway: str = "") -> bool:
        """No more tokens for this session, whoever still works on it. A finished session stays finished.

        With a `gateway`, nothing happens if another one collects the session by now; returns whether none does.
        """
        key = self._session(session)
        mine = True

        async def flip(pipe: Any) -> None:
            nonlocal mine
            status, collector = await pipe.hmget(key, "status", "gateway")
            mine = not gateway or collector is None or collector.decode() == gateway
            pipe.multi()
            if mine and status == SessionStatus.ACTIVE.value.encode():
                pipe.hset(key, "status", SessionStatus.CANCELLED.value)
            if mine:
                pipe.zrem(self._deadlines, session)

        await self._guard(self._redis.transaction(flip, key))
        return mine

    async def collect(self, session: str, gateway: str) -> bool:
        """From now on this gateway collects the session's text, and no other may cancel it; False if it is gone."""
        return await self._hand_over(session, None, gateway)

    async def leave(self, session: str, gateway: str, length: int) -> None:
        """This gateway, which knows so many of its tokens, collects the session no more; if no other does in its
        patience, it is cancelled."""
        await self._hand_over(session, gateway, "", {"left_at": length})

    async def _hand_over(self, session: str, of: str | None, to: str, more: Mapping[str, int] | None = None) -> bool:
        key = self._session(session)
        there = False

        async def flip(pipe: Any) -> None:
            nonlocal there
            collector = await pipe.hget(key, "gateway")
            there = collector is not None
            pipe.multi()
            if there and (of is None or collector.decode() == of):
                pipe.hset(key, mapping={"gateway": to, **(more or {})})
                if to:
                    pipe.hdel(key, "alone_ms")  # its patience begins anew

        await self._guard(self._redis.transaction(flip, key))
        return there

    async def kept(self, session: str) -> bytes | None:
        """What `create` was given to keep; None if it was nothing, or the session is gone."""
        found: bytes | None = await self._guard(self._redis.hget(self._session(session), "kept"))
        return found or None

    async def attend(self, gateway: str) -> None:
        """This gateway is there, for the next seconds."""
        await self._guard(self._redis.set(self._key("gateway", gateway), b"1", px=GATEWAY_TTL_MS))

    async def deadline_ms(self, session: str) -> float | None:
        """When the session's next token is due, in milliseconds on Redis's clock; None without an SLO."""
        score: float | None = await self._guard(self._redis.zscore(self._deadlines, session))
        return None if score == math.inf else score

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Keep a verifier's heartbeat for a few seconds."""
        await self._keep("verifier", heartbeat.verifier, heartbeat, HEARTBEAT_TTL_MS)

    async def silence(self, verifier: str) -> None:
        """Forget a verifier that says goodbye."""
        await self._guard(self._redis.delete(self._key("verifier", verifier), self._key("lease", verifier)))

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


def unpack(body: bytes) -> list[int]:
    """The token ids in these bytes of a session's committed tokens."""
    packed = array("i")
    packed.frombytes(body)
    return packed.tolist()


def _finish(value: bytes | None) -> Finish | None:
    return Finish(value.decode()) if value else None


def _session(fields: list[bytes | None], tokens: bytes | None, now_ms: float) -> Session | None:
    request, status, length, round_, finish, start_ms, first_ms, last_ms, left_at = fields
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
    )
