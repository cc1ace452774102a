"""Usage of API keys, counted in Redis for all gateways together. The counting is `quota.lua`.

    <ns>:quota:{key}      hash: the requests and tokens left of the key's minute, and the time of that count
    <ns>:streams:{key}    sorted set of the key's running sessions, by the time at which their lease expires

Requests and tokens refill evenly: a key can use a whole minute's worth at once, and then each second's share. Leases
are renewed while their sessions run; those of a gateway that died expire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Any

from shared.state.connection import RedisConnection

LEASE_MS = 30_000


class Limited(StrEnum):
    """The limit that refuses a request."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    SESSIONS = "sessions"
    SIZE = "size"
    """The request needs more tokens than the key's whole minute."""


@dataclass(frozen=True)
class Allowance:
    """Limits of an API key; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_sessions: int | None = None

    @property
    def limited(self) -> bool:
        """True if any limit is set."""
        return any((self.requests_per_minute, self.tokens_per_minute, self.max_sessions))


@dataclass(frozen=True)
class QuotaVerdict:
    """Decision about a request and what is left. `wait_ms` is the time until it would be granted, where known."""

    refused: Limited | None
    requests_left: int
    tokens_left: int
    wait_ms: int
    requests_reset_ms: int
    tokens_reset_ms: int


class Quota:
    """The counters of one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._redis = connection.redis
        self._script = self._redis.register_script(files("shared.state").joinpath("quota.lua").read_text())

    async def take(self, key: str, allowance: Allowance, tokens: int, session_ids: Sequence[str]) -> QuotaVerdict:
        """Take one request, `tokens` and a lease for each session, all or nothing."""
        return await self._ask(key, allowance, tokens, "take", session_ids)

    async def join(self, key: str, allowance: Allowance, session_ids: Sequence[str]) -> QuotaVerdict:
        """Take a lease for each session of a request that was counted before, all or none."""
        return await self._ask(key, allowance, 0, "join", session_ids)

    async def settle(self, key: str, allowance: Allowance, unused: int, session_ids: Sequence[str]) -> None:
        """End the leases of sessions and return `unused` tokens; negative if more were used than taken."""
        await self._run(key, allowance, unused, "settle", session_ids)

    async def renew(self, running: Mapping[str, Sequence[str]]) -> None:
        """Renew the leases of these keys' running sessions."""
        ends_ms = await self._connection.now_ms() + LEASE_MS
        async with self._redis.pipeline(transaction=False) as pipe:
            for key, sessions in running.items():
                pipe.zadd(self._streams(key), dict.fromkeys(sessions, ends_ms))
                pipe.pexpire(self._streams(key), LEASE_MS)
            await self._connection.call(pipe.execute())

    async def _ask(
        self, key: str, allowance: Allowance, tokens: int, act: str, session_ids: Sequence[str]
    ) -> QuotaVerdict:
        refused, *counts = await self._run(key, allowance, tokens, act, session_ids)
        return QuotaVerdict(Limited(refused.decode()) if refused else None, *counts)

    async def _run(
        self, key: str, allowance: Allowance, tokens: int, act: str, session_ids: Sequence[str]
    ) -> list[Any]:
        limits = (allowance.requests_per_minute, allowance.tokens_per_minute, allowance.max_sessions)
        arguments: list[str | int] = [*(limit or 0 for limit in limits), tokens, LEASE_MS, act, *session_ids]
        answer: list[Any] = await self._connection.call(
            self._script(keys=[self._connection.key("quota", key), self._streams(key)], args=arguments)
        )
        return answer

    def _streams(self, key: str) -> str:
        return self._connection.key("streams", key)
