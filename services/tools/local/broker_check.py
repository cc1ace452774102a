"""Checks that a broker answers, by logging in."""

from __future__ import annotations

import asyncio

import aio_pika
import redis.asyncio
from aiormq.exceptions import AMQPError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from yarl import URL

from shared.runtime.tls import Tls

TIMEOUT_S = 5.0


class NotReady(Exception):
    """The server does not answer or refuses the login, as the message explains."""


async def check_rabbitmq(url: str, tls: Tls | None = None) -> str:
    """Log in and open a channel; return the server's name and version. Raises NotReady."""
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
    if "valkey_version" in about:
        return f"Valkey {about['valkey_version']}"
    return f"Redis {about['redis_version']}"


async def _reach(host: str, port: int) -> None:
    """Connect by plain TCP first, because a refused connection is then cheap and logs nothing."""
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
    """Return the URL with its password hidden."""
    address = URL(url)
    return str(address.with_password("***")) if address.password else url
