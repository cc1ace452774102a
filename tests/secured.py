"""RabbitMQ and Redis that speak TLS, with certificates made on the spot, and the settings to reach them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from services.tools.local import servers
from services.tools.local.machine import inspect_machine
from services.tools.local.ports import free_ports
from services.tools.local.servers import BrokerServer

RABBITMQ_TLS = """\
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {ca}
ssl_options.certfile = {cert}
ssl_options.keyfile = {key}
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = {ask}
"""
REDIS_TLS = """\
tls-port {port}
tls-ca-cert-file "{ca}"
tls-cert-file "{cert}"
tls-key-file "{key}"
tls-auth-clients {ask}
"""


class Authority:
    """A certificate authority of its own, with files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, file: str = "") -> tuple[Path, Path]:
        """A certificate for a host name or address, and its key."""
        made = self._ca.issue_cert(name)
        cert, key = self.folder / f"{file or name}.crt", self.folder / f"{file or name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(str(key))
        return cert, key


@dataclass(frozen=True)
class Secured:
    """Addresses of both servers by TLS, and without."""

    authority: Authority
    amqps_url: str
    rediss_url: str
    amqp_url: str
    redis_url: str
    rabbitmq: BrokerServer


@asynccontextmanager
async def secured(folder: Path, *, ask: bool, conf: str = "") -> AsyncIterator[Secured]:
    """Both servers. `ask`: only clients with a certificate are served. conf: further lines for RabbitMQ."""
    authority = Authority(folder / "authority")
    cert, key = authority.issue("localhost")
    amqps_port, rediss_port = free_ports(2)
    files = {"ca": authority.file, "cert": cert, "key": key}
    host = inspect_machine()
    assert host.rabbitmq is not None
    assert host.epmd is not None
    assert host.redis is not None
    rabbitmq_conf = RABBITMQ_TLS.format(port=amqps_port, ask=str(ask).lower(), **files) + conf
    rabbitmq = await servers.start_rabbitmq(host.rabbitmq, host.epmd, folder, rabbitmq_conf)
    try:
        await _listening(amqps_port)
        redis_conf = REDIS_TLS.format(port=rediss_port, ask="yes" if ask else "no", **files)
        redis = await servers.start_redis(host.redis, folder, redis_conf)
        try:
            yield Secured(
                authority,
                _moved(rabbitmq.url, "amqps", amqps_port),
                _moved(redis.url, "rediss", rediss_port),
                rabbitmq.url,
                redis.url,
                rabbitmq,
            )
        finally:
            await redis.stop()
    finally:
        await rabbitmq.stop()


async def _listening(port: int) -> None:
    """Wait for RabbitMQ's listener for TLS: it opens after the one that the start waits for."""
    async with asyncio.timeout(servers.RABBITMQ_START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


def _moved(url: str, scheme: str, port: int) -> str:
    login, _, where = url.partition("://")[2].rpartition("@")
    return f"{scheme}://{login}@localhost:{port}/{where.partition('/')[2]}"
