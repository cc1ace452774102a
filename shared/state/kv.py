"""KV blocks in Redis that verifiers hand over to each other.

    <ns>:kv:{kind}:{hex}    KV of a full block of tokens, by the identity of these tokens and all before them, expiring
    <ns>:kvs:{kind}         sorted set of their names, by the time (Redis's clock, ms) at which they expire

`kind` identifies the verifiers that can read the blocks: model, dtype, arithmetic and layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.state.connection import RedisConnection


class KvBlocks:
    """KV blocks of one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def keep(self, kind: str, blocks: Mapping[bytes, bytes], ttl_s: float, most: int) -> int:
        """Store blocks (content by identity) for `ttl_s`, at most `most` of this kind; return the number stored."""
        index, at_ms = self._index(kind), await self._connection.now_ms()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zremrangebyscore(index, 0, at_ms)
            pipe.zcard(index)
            _, present = await self._connection.call(pipe.execute())
        kept = dict(list(blocks.items())[: max(0, most - present)])
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, content in kept.items():
                pipe.set(self._block(kind, name), content, px=int(ttl_s * 1000))
                pipe.zadd(index, {name: at_ms + ttl_s * 1000})
            await self._connection.call(pipe.execute())
        return len(kept)

    async def touch(self, kind: str, names: Sequence[bytes], ttl_s: float) -> list[bool]:
        """Extend the lifetime of blocks to `ttl_s` from now; return for each whether it exists."""
        index, until_ms = self._index(kind), await self._connection.now_ms() + ttl_s * 1000
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.pexpire(self._block(kind, name), int(ttl_s * 1000))
            found = [bool(exists) for exists in await self._connection.call(pipe.execute())]
            if extended := {name: until_ms for name, exists in zip(names, found, strict=True) if exists}:
                pipe.zadd(index, extended)
                await self._connection.call(pipe.execute())
        return found

    async def read(self, kind: str, names: Sequence[bytes]) -> list[bytes | None]:
        """Return the content of the blocks; None for one that does not exist."""
        found: list[bytes | None] = await self._connection.call(
            self._redis.mget([self._block(kind, name) for name in names])
        )
        return found

    def _index(self, kind: str) -> str:
        return self._connection.key("kvs", kind)

    def _block(self, kind: str, name: bytes) -> str:
        return self._connection.key("kv", kind, name.hex())
