"""Removes a stack's namespace from brokers that outlive it."""

from __future__ import annotations

import redis.asyncio

from shared.broker.connection import connect_once
from shared.broker.topology import Topology
from shared.runtime.tls import Tls


async def delete_namespace(amqp_url: str, redis_url: str, namespace: str, tls: Tls) -> None:
    """Delete the namespace's queues, exchanges and keys. All its services must have ended."""
    topology = Topology(namespace)
    shared_queues = (
        topology.generate_queue(),
        topology.verify_queue(),
        topology.sample_queue(),
        topology.dead_queue(),
    )
    context = tls.context() if "amqps:" in amqp_url else None
    async with await connect_once(amqp_url, context) as connection:
        channel = await connection.channel()
        for name in (*(queue.name for queue in shared_queues), topology.journal):
            await channel.queue_delete(name)
        for exchange in (topology.exchange, topology.dead, topology.journal):
            await channel.exchange_delete(exchange)
    async with redis.asyncio.Redis.from_url(redis_url, **tls.redis_options(redis_url)) as client:
        async for key in client.scan_iter(f"{namespace}:*", count=1000):
            await client.delete(key)
