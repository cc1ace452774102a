"""K/V that verifiers hand over to each other, in Redis.

    <ns>:kv:{kind}:{hex}    K/V of a full block of tokens, by the identity of these and all before them, expiring
    <ns>:kvs:{kind}         sorted set: their names, by the time (Redis's clock, ms) at which they expire

`kind` says who can read them: model, dtype, layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redis.asyncio import Redis

from shared.state.redis_calls import Guarded, now_ms


class KvBlocks:
    """The blocks of one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, redis: Redis, namespace: str, guard: Guarded) -> None:
        self._redis = redis
        self._namespace = namespace
        self._guard = guard

    async def keep(self, kind: str, blocks: Mapping[bytes, bytes], ttl_s: float, most: int) -> int:
        """Keep blocks (identity: content) for a while, at most `most` of this kind in all; returns how many were."""
        index, at_ms = self._index(kind), await now_ms(self._redis, self._guard)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zremrangebyscore(index, 0, at_ms)
            pipe.zcard(index)
            _, there = await self._guard(pipe.execute())
        kept = dict(list(blocks.items())[: max(0, most - there)])
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, content in kept.items():
                pipe.set(self._block(kind, name), content, px=int(ttl_s * 1000))
                pipe.zadd(index, {name: at_ms + ttl_s * 1000})
            await self._guard(pipe.execute())
        return len(kept)

    async def touch(self, kind: str, names: Sequence[bytes], ttl_s: float) -> list[bool]:
        """Keep these blocks for so long from now on; says of each whether it is there."""
        index, until_ms = self._index(kind), await now_ms(self._redis, self._guard) + ttl_s * 1000
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.pexpire(self._block(kind, name), int(ttl_s * 1000))
            found = [bool(there) for there in await self._guard(pipe.execute())]
            if there := {name: until_ms for name, is_there in zip(names, found, strict=True) if is_there}:
                pipe.zadd(index, there)
                await self._guard(pipe.execute())
        return found

    async def read(self, kind: str, names: Sequence[bytes]) -> list[bytes | None]:
        """Content of these blocks; None for one that is not there."""
        found: list[bytes | None] = await self._guard(self._redis.mget([self._block(kind, name) for name in names]))
        return found

    def _index(self, kind: str) -> str:
        return f"{self._namespace}:kvs:{kind}"

    def _block(self, kind: str, name: bytes) -> str:
        return f"{self._namespace}:kv:{kind}:{name.hex()}"
