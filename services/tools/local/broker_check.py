"""Checks that a broker answers, by logging in."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import aio_pika
import redis.asyncio
from aiormq.exceptions import AMQPError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from yarl import URL

from services.tools.local.machine import version_in
from shared.broker.connection import addresses
from shared.runtime.tls import Tls

TIMEOUT_S = 5.0


class NotReady(Exception):
    """The server does not answer or refuses the login, as the message explains."""


async def check_rabbitmq(url: str, tls: Tls | None = None) -> str:
    """Log in and open a channel; return the server's name and version. Raises NotReady.

    Of several addresses, separated by commas, the first that answers is used; the error is the last one's.
    """
    *others, last = addresses(url)
    for other in others:
        with suppress(NotReady):
            return await _check_node(other, tls)
    return await _check_node(last, tls)


async def _check_node(url: str, tls: Tls | None) -> str:
    address = URL(url)
    await _reach(address.host or "", address.port or (5671 if address.scheme == "amqps" else 5672))
    try:
        context = (tls or Tls()).context() if address.scheme == "amqps" else None
        connection = await aio_pika.connect(url, timeout=TIMEOUT_S, ssl_context=context)
        async with connection:
            await connection.channel()
            assert connection.transport is not None
            properties = connection.transport.connection.server_properties
            return f"{_text(properties.get('product', 'AMQP server'))} {_text(properties.get('version', ''))}".strip()
    except (OSError, TimeoutError, AMQPError, aio_pika.exceptions.AMQPException) as error:
        raise NotReady(_reason(error)) from None


async def check_redis(url: str, tls: Tls | None = None) -> str:
    """Log in and return the server's name and version. Raises NotReady."""
    client = redis.asyncio.Redis.from_url(
        url,
        socket_connect_timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        **(tls or Tls()).redis_options(url),
    )
    try:
        about = await client.info("server")
    except (RedisError, OSError, ValueError) as error:
        raise NotReady(_reason(error)) from None
    finally:
        await client.aclose()
    if "cluster" in (about.get("redis_mode"), about.get("server_mode")):
        raise NotReady(
            "it is a Redis Cluster, and WISP's scripts need all keys of a namespace on one server; use a Redis without "
            "cluster mode"
        )
    if "valkey_version" in about:
        return f"Valkey {about['valkey_version']}"
    return f"Redis {about['redis_version']}"


@dataclass(frozen=True)
class TestedVersions:
    """The versions of a server that WISP was tested with, from the first to the last."""

    __test__ = False  # pytest collects classes by name

    first: tuple[int, ...]
    last: tuple[int, ...]

    def __str__(self) -> str:
        return " to ".join(".".join(map(str, version)) for version in (self.first, self.last))

    def include(self, version: tuple[int, ...]) -> bool:
        """Return whether a version is one of them; further parts of its number do not matter."""
        return self.first <= version[: len(self.first)] and version[: len(self.last)] <= self.last


TESTED = {
    "RabbitMQ": TestedVersions((3, 10), (4, 3)),
    "Redis": TestedVersions((7,), (8,)),
    "Valkey": TestedVersions((8,), (9,)),
}
"""By the server's name."""


def tested_versions(server: str) -> TestedVersions | None:
    """Return the tested versions of a server whose own version is not one of them, else None.

    server: name and version, as `check_rabbitmq` and `check_redis` return them.
    """
    name, _, version = server.partition(" ")
    known = TESTED.get(name)
    return None if known is None or known.include(version_in(version)) else known


CLUSTER_ADVANCED = "[{kernel, [{net_setuptime, 1}]}]."
"""The `advanced.config` of each node of a RabbitMQ cluster. By default the other nodes try for 7 s to connect to a node
that hangs before they give the rounds of its scheduler to another one."""


def cluster_settings(version: tuple[int, ...]) -> list[str]:
    """Return the lines of `rabbitmq.conf` that each node of a RabbitMQ cluster of this version needs.

    net_ticktime: by default the other nodes drop a node that hangs after 60 s.
    consumer_disconnected_timeout: by default the drafters of a lost node keep their requests for 60 s.
    cluster_partition_handling: a node that hung for longer comes back by a restart; with `pause_minority` it goes on
    without the other nodes' queues. Version 4.3 needs no such setting.
    """
    own = "consumer_disconnected_timeout = 1000" if version >= (4, 3) else "cluster_partition_handling = autoheal"
    return ["net_ticktime = 5", own]


async def _reach(host: str, port: int) -> None:
    """Connect by plain TCP. A connection that is refused here costs little and logs nothing."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        raise NotReady(_reason(error)) from None
    writer.close()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def without_password(url: str) -> str:
    """Return the URL, or the URLs, with each password hidden."""
    shown = [(URL(each), each) for each in addresses(url)]
    return ",".join(str(address.with_password("***")) if address.password else each for address, each in shown)
