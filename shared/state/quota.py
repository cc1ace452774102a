"""What the holder of an API key may use, counted in Redis for all gateways together. See `quota.lua`.

    <ns>:quota:{key}      hash: what is left of a minute's requests and tokens, and when that was so
    <ns>:streams:{key}    sorted set: the key's running sessions, by the time at which their lease ends

Requests and tokens fill up evenly, so that a minute's worth can be used at once and then what a second brings in each
second. Leases are renewed while their sessions run: those of a gateway that died end by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis

from shared.state.redis_calls import Guarded, now_ms

LEASE_MS = 30_000


class Limited(StrEnum):
    """Which limit refuses."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    SESSIONS = "sessions"
    SIZE = "size"
    """One request asks for more tokens than a minute has."""


@dataclass(frozen=True)
class Allowance:
    """A key's limits; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_sessions: int | None = None

    @property
    def limited(self) -> bool:
        """Whether there is anything to count."""
        return any((self.requests_per_minute, self.tokens_per_minute, self.max_sessions))


@dataclass(frozen=True)
class Verdict:
    """What was decided, and what is left; `wait_ms` until the same request would be granted, where that is known."""

    refused: Limited | None
    requests_left: int
    tokens_left: int
    wait_ms: int
    requests_reset_ms: int
    tokens_reset_ms: int


class Quota:
    """The counters in one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, redis: Redis, namespace: str, guard: Guarded) -> None:
        self._redis = redis
        self._namespace = namespace
        self._guard = guard
        self._script = redis.register_script(files("shared.state").joinpath("quota.lua").read_text())

    async def take(self, key: str, allowance: Allowance, tokens: int, sessions: Sequence[str]) -> Verdict:
        """Take one request, `tokens`, and a lease for each session; all of it or nothing."""
        return await self._ask(key, allowance, tokens, "take", sessions)

    async def join(self, key: str, allowance: Allowance, sessions: Sequence[str]) -> Verdict:
        """Take a lease for each session of a request that was taken before; all of them or none."""
        return await self._ask(key, allowance, 0, "join", sessions)

    async def settle(self, key: str, allowance: Allowance, unused: int, sessions: Sequence[str]) -> None:
        """The sessions have ended: give back tokens that were taken and not used. Negative: more were used."""
        await self._run(key, allowance, unused, "settle", sessions)

    async def renew(self, running: Mapping[str, Sequence[str]]) -> None:
        """The sessions of these keys still run."""
        ends_ms = await now_ms(self._redis, self._guard) + LEASE_MS
        async with self._redis.pipeline(transaction=False) as pipe:
            for key, sessions in running.items():
                pipe.zadd(self._streams(key), dict.fromkeys(sessions, ends_ms))
                pipe.pexpire(self._streams(key), LEASE_MS)
            await self._guard(pipe.execute())

    async def _ask(self, key: str, allowance: Allowance, tokens: int, act: str, sessions: Sequence[str]) -> Verdict:
        refused, *counts = await self._run(key, allowance, tokens, act, sessions)
        return Verdict(Limited(refused.decode()) if refused else None, *counts)

    async def _run(self, key: str, allowance: Allowance, tokens: int, act: str, sessions: Sequence[str]) -> list[Any]:
        limits = (allowance.requests_per_minute, allowance.tokens_per_minute, allowance.max_sessions)
        arguments: list[str | int] = [*(limit or 0 for limit in limits), tokens, LEASE_MS, act, *sessions]
        answer: list[Any] = await self._guard(
            self._script(keys=[f"{self._namespace}:quota:{key}", self._streams(key)], args=arguments)
        )
        return answer

    def _streams(self, key: str) -> str:
        return f"{self._namespace}:streams:{key}"
