"""RabbitMQ, Redis and the gateway by TLS, with certificates made on the spot."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from gateway_peer import Peer, settings
from gateway_suite import MODEL, answers, free_port
from patience import HANG_S
from secured import Authority, Secured, secured

from services.gateway import server
from services.gateway.service import serve
from services.tools.local import logs
from services.tools.local.broker_check import NotReady, check_rabbitmq, check_redis
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import BrokersError
from shared.messages import Cancel, Message
from shared.models.folder import ModelFolder
from shared.runtime.tls import Tls
from shared.state.store import Store


@pytest.fixture(scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Secured]:
    """Servers that ask their clients for certificates."""
    async with secured(tmp_path_factory.mktemp("secured"), ask=True) as running:
        yield running


@pytest.fixture(scope="module")
def known(servers: Secured) -> Tls:
    """A client that the servers accept."""
    return Tls(servers.authority.file, *servers.authority.issue("client"))


async def test_messages_and_state_go_by_tls(servers: Secured, known: Tls, namespace: str) -> None:
    assert "RabbitMQ" in await check_rabbitmq(servers.amqps_url, known)
    assert "Redis" in await check_redis(servers.rediss_url, known)
    broker = await Broker.connect(servers.amqps_url, Topology(namespace), "x", tls=known)
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await broker.consume(broker.topology.own_queue("test", "x", (topology.CANCEL,)), heard.put)
    await broker.publish(Cancel(session="s", reason="r"), topology.CANCEL)
    assert (await asyncio.wait_for(heard.get(), HANG_S)) == Cancel(session="s", reason="r")
    await broker.close()
    store = Store.connect(servers.rediss_url, namespace, 60, known)
    await store.ping()
    await store.close()


async def test_a_server_that_another_authority_vouches_for_is_not_trusted(
    servers: Secured, known: Tls, namespace: str, tmp_path: Path
) -> None:
    misled = Tls(Authority(tmp_path).file, known.cert_file, known.key_file)
    async with asyncio.timeout(10):  # the error comes at once, without half a minute of retries
        with pytest.raises(BrokersError, match=r"cannot be trusted.*WISP_TLS_CA_FILE") as refused:
            await Broker.connect(servers.amqps_url, Topology(namespace), "x", tls=misled)
    assert servers.amqps_url.split("@")[0].split(":")[-1] not in str(refused.value)
    store = Store.connect(servers.rediss_url, namespace, 60, misled)
    with pytest.raises(BrokersError, match="certificate verify failed"):
        await store.ping()
    await store.close()
    with pytest.raises(NotReady, match="certificate verify failed"):
        await check_rabbitmq(servers.amqps_url, misled)


async def test_a_server_with_a_certificate_for_another_name_is_not_trusted(
    servers: Secured, known: Tls, namespace: str
) -> None:
    with pytest.raises(BrokersError, match=r"cannot be trusted.*127\.0\.0\.1"):
        await Broker.connect(servers.amqps_url.replace("localhost", "127.0.0.1"), Topology(namespace), "x", tls=known)
    store = Store.connect(servers.rediss_url.replace("localhost", "127.0.0.1"), namespace, 60, known)
    with pytest.raises(BrokersError, match="certificate verify failed"):
        await store.ping()
    await store.close()


async def test_clients_without_a_certificate_are_refused(servers: Secured, namespace: str) -> None:
    stranger = Tls(servers.authority.file)
    with pytest.raises(NotReady):
        await check_rabbitmq(servers.amqps_url, stranger)
    store = Store.connect(servers.rediss_url, namespace, 60, stranger)
    with pytest.raises(BrokersError):
        await store.ping()
    await store.close()


async def test_a_gateway_by_https_in_front_of_brokers_by_tls(
    servers: Secured, known: Tls, namespace: str, target: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CERTIFICATE_CHECK_S", 0.05)
    cert, key = servers.authority.issue("localhost", "gateway")
    port = free_port()
    given = settings(
        target.path,
        namespace=namespace,
        amqp_url=servers.amqps_url,
        redis_url=servers.rediss_url,
        tls_ca_file=known.ca_file,
        tls_cert_file=known.cert_file,
        tls_key_file=known.key_file,
        https_cert_file=cert,
        https_key_file=key,
        port=port,
    )
    stop = asyncio.Event()
    url = f"https://localhost:{port}"
    trusting = ssl.create_default_context(cafile=servers.authority.file)
    # The peer stands for the other services and comes by the servers' plain doors.
    async with Peer.run(servers.amqp_url, servers.redis_url, namespace, target) as peer:
        serving = asyncio.create_task(serve(given, given.instance, stop))
        async with httpx.AsyncClient(base_url=url, timeout=HANG_S, verify=trusting) as http:
            await answers(http)
            assert (await http.get("/ready")).json() == {"ready": True, "parts": dict.fromkeys(READY, "ok")}
            asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
            answer = (await http.post("/v1/chat/completions", json=asked)).json()
            assert answer["choices"][0]["message"]["content"] == peer.script.text
            assert await logs.answers(f"https://127.0.0.1:{port}/ready")
        async with httpx.AsyncClient(base_url=url.replace("https", "http")) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get("/health")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as unaware:
            with pytest.raises(openai.APIConnectionError):
                await unaware.models.list()
        # A renewed certificate, of another authority: new connections get it, without a restart. Half a pair is none.
        other = Authority(servers.authority.folder / "renewed")
        renewed_cert, renewed_key = other.issue("localhost")
        key.write_bytes(renewed_key.read_bytes())
        await asyncio.sleep(0.3)
        assert await answers_to(url, trusting)
        cert.write_bytes(renewed_cert.read_bytes())
        async with asyncio.timeout(HANG_S):
            while not await answers_to(url, ssl.create_default_context(cafile=other.file)):  # noqa: ASYNC110 - unseen
                await asyncio.sleep(0.05)
        assert not await answers_to(url, trusting)
        stop.set()
        await asyncio.wait_for(serving, HANG_S)


READY = ("rabbitmq", "redis", "verifier", "gateway")


async def answers_to(url: str, trusting: ssl.SSLContext) -> bool:
    """True if somebody who trusts these authorities gets an answer on a new connection."""
    async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
        try:
            return (await http.get("/health")).status_code == 200
        except httpx.ConnectError:
            return False
