"""What everything that talks to Redis shares: how it calls, and whose clock it goes by."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis

Guarded = Callable[[Any], Awaitable[Any]]
"""Awaits a call to Redis and turns its errors into ours."""


async def now_ms(redis: Redis, guard: Guarded) -> float:
    """Redis's clock, in milliseconds since 1970: the one that all hosts agree on. Raises what the guard raises."""
    seconds, microseconds = await guard(redis.time())
    return float(seconds * 1000 + microseconds / 1000)
