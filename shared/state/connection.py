"""Connection to Redis, in one namespace: keys, clock and errors."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from shared.errors import BrokersError
from shared.runtime.tls import Tls
from shared.state import metrics

CONNECTIONS = 32
"""Size of the connection pool. More connections would not make Redis faster."""
CONNECTION_WAIT_S = 30.0
"""Longest wait of a call for a free connection, during a burst."""

CLUSTER_CHECK_S = 5.0

# A restarting server is retried. A server that hangs is not, so that a call ends within seconds.
_RETRY = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=6, supported_errors=(RedisConnectionError,))


class RedisConnection:
    """A pool of connections to Redis. Every call raises BrokersError when Redis cannot be reached."""

    def __init__(self, redis: Redis, namespace: str) -> None:
        self.redis = redis
        self._namespace = namespace

    @classmethod
    def to(cls, url: str, namespace: str, tls: Tls | None = None) -> RedisConnection:
        """Return a pool for this URL. Connections open on first use."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=CONNECTION_WAIT_S,
            socket_connect_timeout=5,
            socket_timeout=5,
            retry=_RETRY,
            **(tls or Tls()).redis_options(url),
        )
        return cls(Redis.from_pool(pool), namespace)

    def key(self, *parts: str) -> str:
        """Return the key of these parts in the namespace."""
        return ":".join((self._namespace, *parts))

    async def call(self, awaitable: Any) -> Any:
        """Await a call to Redis. Raises BrokersError for its errors."""
        metrics.CALLS.inc()
        try:
            return await awaitable
        except (RedisError, OSError) as error:
            raise BrokersError(f"Redis: {error}; check WISP_REDIS_URL and that the server is up") from error

    async def now_ms(self) -> float:
        """Return Redis's clock, in milliseconds since 1970: the only clock that all hosts share."""
        seconds, microseconds = await self.call(self.redis.time())
        return float(seconds * 1000 + microseconds / 1000)

    async def ping(self) -> None:
        """Raise BrokersError unless Redis answers."""
        await self.call(self.redis.ping())

    async def refuse_cluster(self) -> None:
        """Raise BrokersError if the server belongs to a Redis Cluster. Passes while it does not answer."""
        try:
            async with asyncio.timeout(CLUSTER_CHECK_S):
                about = await self.redis.info("server")
        except (RedisError, OSError):
            return
        if "cluster" in (about.get("redis_mode"), about.get("server_mode")):
            raise BrokersError(
                "WISP_REDIS_URL is a Redis Cluster: the scripts that commit tokens need all keys of a namespace on one "
                "server. Use a Redis without cluster mode; a larger fleet gets one Redis and namespace for each cell"
            )

    async def close(self) -> None:
        """Close the connections."""
        await self.redis.aclose()
