"""Registry of running instances in Redis: heartbeats, leases and cost models of verifiers, and gateways alive.

    <ns>:verifier:{id}     last heartbeat of a verifier, expiring; the set <ns>:verifiers holds their names
    <ns>:lease:{id}        lease of a verifier, expiring unless renewed
    <ns>:costmodel:{id}    last cost model of a verifier, expiring; the set <ns>:costmodels holds their names
    <ns>:gateway:{id}      exists while this gateway lives

A verifier commits under a lease: a number that it keeps as long as it renews it in time. A verifier that was frozen or
cut off for longer gets a new lease. Nothing that it received under the old one is committed, because its sessions have
moved to other verifiers.
"""

from __future__ import annotations

from contextlib import suppress
from secrets import randbelow

from shared.errors import MessageError
from shared.messages import SILENT_MS, CostModel, Heartbeat, Message, decode, encode
from shared.runtime.tls import Tls
from shared.state.connection import RedisConnection

HEARTBEAT_TTL_MS = 3000
GATEWAY_TTL_MS = 5000
"""A gateway that does not call `attend` for this long counts as gone, and collects no session."""
COSTMODEL_TTL_MS = 7 * 24 * 3600 * 1000

_RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return 1
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 0
"""


class Registry:
    """The registry of one namespace. Every method raises BrokersError when Redis cannot be reached."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._redis = connection.redis
        self._renew = self._redis.register_script(_RENEW)

    @classmethod
    def connect(cls, url: str, namespace: str, tls: Tls | None = None) -> Registry:
        """Return the registry at this URL. Connections open on first use."""
        return cls(RedisConnection.to(url, namespace, tls))

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def refuse_cluster(self) -> None:
        """Raise BrokersError if the server belongs to a Redis Cluster. Passes while it does not answer."""
        await self._connection.refuse_cluster()

    async def ping(self) -> None:
        """Raise BrokersError unless Redis answers."""
        await self._connection.ping()

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Store a verifier's heartbeat for a few seconds."""
        await self._save("verifier", heartbeat.verifier, heartbeat, HEARTBEAT_TTL_MS)

    async def heartbeats(self) -> list[Heartbeat]:
        """Return the heartbeats of the live verifiers."""
        return [message for message in await self._load("verifier") if isinstance(message, Heartbeat)]

    async def remove(self, verifier_id: str) -> None:
        """Remove the heartbeat and the lease of a verifier that shuts down."""
        keys = [self._connection.key(kind, verifier_id) for kind in ("verifier", "lease")]
        await self._connection.call(self._redis.delete(*keys))

    async def renew(self, verifier_id: str, lease: int) -> int:
        """Return the verifier's lease for the next `SILENT_MS`: `lease` if it still holds that, else a new one."""
        new = 1 + randbelow(2**53)
        keys, arguments = [self._connection.key("lease", verifier_id)], [lease, new, SILENT_MS]
        return lease if await self._connection.call(self._renew(keys=keys, args=arguments)) else new

    async def save_cost_model(self, model: CostModel) -> None:
        """Store a verifier's cost model for schedulers and estimators that restart."""
        await self._save("costmodel", model.verifier, model, COSTMODEL_TTL_MS)

    async def cost_models(self) -> list[CostModel]:
        """Return the last cost model of every recently measured verifier."""
        return [message for message in await self._load("costmodel") if isinstance(message, CostModel)]

    async def attend(self, gateway_id: str) -> None:
        """Mark a gateway as alive for the next `GATEWAY_TTL_MS`."""
        await self._connection.call(
            self._redis.set(self._connection.key("gateway", gateway_id), b"1", px=GATEWAY_TTL_MS)
        )

    async def _save(self, kind: str, name: str, message: Message, ttl_ms: int) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._connection.key(kind, name), encode(message), px=ttl_ms)
            pipe.sadd(self._connection.key(f"{kind}s"), name)
            await self._connection.call(pipe.execute())

    async def _load(self, kind: str) -> list[Message]:
        index = self._connection.key(f"{kind}s")
        names = sorted(name.decode() for name in await self._connection.call(self._redis.smembers(index)))
        if not names:
            return []
        keys = [self._connection.key(kind, name) for name in names]
        bodies = await self._connection.call(self._redis.mget(keys))
        messages = []
        for body in bodies:
            with suppress(MessageError):  # a message of a newer version expires by itself
                messages += [decode(body)] if body is not None else []
        expired = [name for name, body in zip(names, bodies, strict=True) if body is None]
        if expired:
            await self._connection.call(self._redis.srem(index, *expired))
        return messages
