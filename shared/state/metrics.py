"""Metrics of the connection to Redis."""

from prometheus_client import Counter

CALLS = Counter("wisp_redis_calls", "Calls to Redis, a pipeline or a script counted once")
