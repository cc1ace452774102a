"""The gateway during outages of RabbitMQ and Redis, and as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import httpx
import openai
import psutil
import pytest
from gateway_peer import Peer, Script, eventually, tiny_target
from gateway_suite import MODEL, answers, free_port, started
from link import link_to
from patience import HANG_S
from redis.asyncio import Redis

from services.gateway.fleet import FRESH_S
from shared.models.folder import ModelFolder
from shared.state.sessions import Request
from shared.state.store import Store


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return tiny_target(tmp_path_factory.mktemp("models") / MODEL)


async def test_the_gateway_survives_an_outage_of_rabbitmq(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        link_to(amqp_url) as link,
        started(link.url, redis_url, namespace, target, peer_amqp_url=amqp_url, idle_check_s=0.2) as suite,
    ):
        suite.peer.script = Script(text="the whole text, come what may", round_len=2, pause_s=0.1)
        asking = asyncio.create_task(suite.chat())
        await eventually(lambda: bool(suite.peer.generated))
        await link.cut()
        ready = await suite.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["parts"]["rabbitmq"] != "ok"
        assert (await suite.http.get("/health")).status_code == 200
        with monkeypatch.context() as patience:
            patience.setattr("shared.broker.client.PERSISTENT_TIMEOUT_S", 2.0)
            with pytest.raises(openai.InternalServerError) as caught:
                await suite.chat()
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        assert (await asking).choices[0].message.content == suite.peer.script.text
        await link.mend()
        await answers(suite.http, "/ready")
        suite.peer.script = Script(text="as good as new")
        assert (await suite.chat()).choices[0].message.content == "as good as new"


async def test_the_gateway_survives_an_outage_of_redis(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with (
        link_to(redis_url) as link,
        started(amqp_url, link.url, namespace, target, peer_redis_url=redis_url, outage_wait_s=1) as suite,
    ):
        await link.cut()
        assert (await suite.http.get("/ready")).json()["parts"]["redis"] != "ok"
        with pytest.raises(openai.InternalServerError) as caught:
            await suite.chat()
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        await link.mend()
        await answers(suite.http, "/ready")
        assert (await suite.chat()).choices[0].message.content == suite.peer.script.text


async def test_requests_wait_out_a_pause_of_redis(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with (
        link_to(redis_url) as link,
        started(amqp_url, link.url, namespace, target, peer_redis_url=redis_url, idle_check_s=0.2) as suite,
    ):
        suite.peer.script = Script(text="the whole text, come what may", round_len=2, pause_s=0.1)
        running = asyncio.create_task(suite.chat())
        await eventually(lambda: bool(suite.peer.generated))
        link.flowing.clear()
        new = [asyncio.create_task(suite.chat(n=2)) for _ in range(3)]
        # Longer than a session without results is left alone, and than Redis may take to answer a call.
        await asyncio.sleep(7)
        assert not any(one.done() for one in new)
        link.flowing.set()
        answers = await asyncio.gather(running, *new)
        texts = {choice.message.content for answer in answers for choice in answer.choices}
        assert texts == {suite.peer.script.text}


async def test_requests_wait_for_heartbeats_that_expired(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with started(amqp_url, redis_url, namespace, target, outage_wait_s=5) as suite:
        assert (await suite.chat()).choices[0].message.content == suite.peer.script.text
        suite.peer.beats = False
        await suite.peer.store.registry.remove(suite.peer.heartbeat.verifier)
        await asyncio.sleep(FRESH_S)
        asking = asyncio.create_task(suite.chat())
        await asyncio.sleep(2)
        assert not asking.done()
        assert (await suite.http.get("/ready")).json()["parts"]["verifier"] != "ok"
        suite.peer.beats = True
        assert (await asking).choices[0].message.content == suite.peer.script.text


async def test_lost_state_ends_a_session_in_a_clear_error(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with started(amqp_url, redis_url, namespace, target, idle_check_s=0.1) as suite:
        suite.peer.script = Script(text="", ends=False)
        asking = asyncio.create_task(suite.chat())
        await eventually(lambda: bool(suite.peer.generated))
        await suite.peer.store._redis.delete(f"{namespace}:session:{suite.peer.generated[0].session}")
        with pytest.raises(openai.InternalServerError, match="was lost"):
            await asking


async def test_a_session_whose_creation_takes_long_is_not_lost(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create

    async def slowly(store: Store, request: Request, *rest: Any, **fields: Any) -> bool:
        await asyncio.sleep(1.0)
        return await create(store, request, *rest, **fields)

    monkeypatch.setattr(Store, "create", slowly)
    async with started(amqp_url, redis_url, namespace, target, idle_check_s=0.1) as suite:
        assert (await suite.chat()).choices[0].message.content == suite.peer.script.text


async def test_nothing_runs_on_when_a_session_is_given_up_during_its_creation(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, creations = Store.create, []

    async def late(store: Store, request: Request, *rest: Any, **fields: Any) -> bool:
        async def once_cancelled() -> bool:
            async with Redis.from_url(redis_url) as redis, asyncio.timeout(HANG_S):
                while not await redis.exists(f"{namespace}:session:{request.session}"):  # noqa: ASYNC110 - Redis's
                    await asyncio.sleep(0.02)
            return await create(store, request, *rest, **fields)

        creations.append(asyncio.create_task(once_cancelled()))
        return await asyncio.shield(creations[-1])

    monkeypatch.setattr(Store, "create", late)
    async with started(amqp_url, redis_url, namespace, target, stall_timeout_s=0.5) as suite:
        with pytest.raises(openai.InternalServerError, match="no token came"):
            await suite.chat()
        assert [await creation for creation in creations] == [False]
        assert suite.peer.generated == []
        assert await suite.peer.store.reap() == []
        async with Redis.from_url(redis_url) as redis:
            assert await redis.zcard(f"{namespace}:deadlines") == 0


async def test_the_process_is_small_and_drains_on_sigterm(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    port = free_port()
    environment = os.environ | {
        "WISP_AMQP_URL": amqp_url,
        "WISP_REDIS_URL": redis_url,
        "WISP_NAMESPACE": namespace,
        "WISP_TARGET": str(target.path),
    }
    async with Peer.run(amqp_url, redis_url, namespace, target) as peer:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "services.gateway", "--port", str(port)),
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with (
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
                openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
            ):
                await answers(http, "/ready")
                peer.script = Script(text="to the very end", pause_s=0.1)
                asking = asyncio.create_task(client.completions.create(model=MODEL, prompt="x", max_tokens=50))
                await eventually(lambda: bool(peer.generated))
                assert psutil.Process(process.pid).memory_info().rss < 150e6
                process.send_signal(signal.SIGTERM)
                assert (await asking).choices[0].text == "to the very end"
            async with asyncio.timeout(HANG_S):
                _, log = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == 0, log.decode()
    assert b"Traceback" not in log


async def test_a_taken_port_ends_the_process_with_a_clear_message(
    amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with started(amqp_url, redis_url, namespace, target) as suite:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "services.gateway", "--port", str(suite.address[1]), "--target", str(target.path)),
            *("--amqp-url", amqp_url, "--redis-url", redis_url, "--namespace", namespace),
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(HANG_S):
            _, log = await process.communicate()
    assert process.returncode == 1
    assert b"WISP_PORT" in log
    assert b"Traceback" not in log
