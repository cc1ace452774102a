"""The health check of a process fails when a consumer is gone, not only when the process has ended."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import httpx
import pytest
from aiormq.exceptions import AMQPError
from patience import HANG_S

from services.tools.local import machine, servers
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import EngineError, SettingsError
from shared.messages import Message
from shared.runtime import health
from shared.runtime.health import Health
from shared.state.store import Store


async def ignore(message: Message) -> None:
    """A consumer."""


@dataclass
class Served:
    health: Health
    broker: Broker
    store: Store
    port: int

    async def asked(self, path: str) -> tuple[int, str]:
        async with httpx.AsyncClient(timeout=HANG_S) as client:
            answer = await client.get(f"http://127.0.0.1:{self.port}{path}")
        return answer.status_code, answer.text


@pytest.fixture
async def served(amqp_url: str, redis_url: str, namespace: str) -> AsyncIterator[Served]:
    broker = await Broker.connect(amqp_url, Topology(namespace), "healthy")
    store = Store.connect(redis_url, namespace, 60)
    own = Health()
    port = health.serve(own, "127.0.0.1", 0, asyncio.get_running_loop())
    yield Served(own, broker, store, port)
    with suppress(Exception):
        await broker.close()
    await store.close()


async def consuming(served: Served) -> None:
    await served.broker.consume(served.broker.topology.own_queue("test", "healthy", ()), ignore)
    await served.broker.consume(served.broker.topology.verify_queue(), ignore)
    served.health.watch(served.broker, served.store)


async def test_a_process_is_ready_only_while_it_consumes(served: Served) -> None:
    assert await served.asked("/ready") == (503, "process: starting\n")
    assert await served.asked("/live") == (200, "ok\n")
    await consuming(served)
    assert await served.asked("/ready") == (200, "ok\n")
    assert await served.asked("/live") == (200, "ok\n")
    served.health.notes = lambda: {"pool p": "no drafter"}
    assert await served.asked("/ready") == (200, "ok\npool p: no drafter\n")
    assert await served.asked("/live") == (200, "ok\n")
    served.health.stopping = True
    assert await served.asked("/ready") == (503, "process: shutting down\n")
    assert await served.asked("/live") == (200, "ok\n")
    assert (await served.asked("/nothing"))[0] == 404
    status, text = await served.asked("/metrics")
    assert status == 200
    assert "python_info" in text


async def test_a_consumer_that_the_broker_has_cancelled_is_noticed(
    served: Served, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise AMQPError("the queue cannot be declared again")

    await consuming(served)
    monkeypatch.setattr("shared.broker.connection._RestoredQueue._probe", refuse)
    async with await aio_pika.connect(amqp_url) as connection:
        queue = await (await connection.channel()).get_queue(served.broker.topology.verify_queue().name)
        await queue.delete(if_unused=False, if_empty=False)
    name = served.broker.topology.verify_queue().name
    await answered(served, 503, f"rabbitmq: RabbitMQ has cancelled the consumer of queue {name}\n")
    assert (await served.asked("/live"))[0] == 503, "starting it again declares the queue again"
    monkeypatch.undo()
    await answered(served, 200, "ok\n")


async def answered(served: Served, status: int, text: str) -> None:
    """Wait for this answer to /ready."""
    async with asyncio.timeout(HANG_S):
        while await served.asked("/ready") != (status, text):  # noqa: ASYNC110 another thread answers
            await asyncio.sleep(0.1)


async def test_without_rabbitmq_a_process_is_not_ready_but_needs_no_restart(served: Served) -> None:
    await consuming(served)
    await served.broker.close()
    status, text = await served.asked("/ready")
    assert status == 503
    assert text == "rabbitmq: no connection to RabbitMQ\n"
    assert await served.asked("/live") == (200, "ok\n")


async def test_an_alarm_at_rabbitmq_starts_nothing_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, namespace: str
) -> None:
    here = machine.inspect_machine()
    if here.rabbitmq is None or here.epmd is None:
        pytest.skip("needs an installed RabbitMQ, to give it too little memory")
    monkeypatch.setattr(servers, "RABBITMQ_CONF", servers.RABBITMQ_CONF.replace("1GiB", "1MiB"))
    monkeypatch.setattr(health, "CHECK_S", 1.0)
    server = await servers.start_rabbitmq(here.rabbitmq, here.epmd, tmp_path)
    alarmed = Served(Health(), await Broker.connect(server.url, Topology(namespace), "alarmed"), served.store, 0)
    try:
        await consuming(alarmed)
        problem = "RabbitMQ accepts no messages now; see its memory and disk alarms"
        async with asyncio.timeout(HANG_S):
            while not (problems := await alarmed.health.ready()):  # noqa: ASYNC110 - RabbitMQ's look at its memory
                await asyncio.sleep(0.1)
        assert problems == {"rabbitmq": problem}
        assert await alarmed.health.live() == {}
    finally:
        # It would wait for its last messages to be taken.
        with suppress(TimeoutError):
            await asyncio.wait_for(alarmed.broker.close(), 2)
        await server.stop()


async def test_without_redis_a_process_is_not_ready_but_lives(served: Served, namespace: str) -> None:
    await consuming(served)
    served.health.watch(served.broker, Store.connect("redis://127.0.0.1:1/0", namespace, 60))
    status, text = await served.asked("/ready")
    assert status == 503
    assert text.startswith("redis: ")
    assert (await served.asked("/live"))[0] == 200


async def test_a_part_of_its_own_is_asked_like_the_brokers(served: Served) -> None:
    broken: list[str] = []

    async def engine() -> None:
        if broken:
            raise EngineError(broken[0])

    served.health.watch(None, None, engine=engine)
    assert await served.asked("/ready") == (200, "ok\n")
    broken.append("has ended")
    assert await served.asked("/ready") == (503, "engine: has ended\n")
    assert await served.asked("/live") == (200, "ok\n")


async def test_an_event_loop_that_hangs_is_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ASK_S", 0.3)
    await consuming(served)
    with ThreadPoolExecutor() as other:
        asking = other.submit(httpx.get, f"http://127.0.0.1:{served.port}/live", timeout=HANG_S)
        answer = asking.result()  # the hang: this thread waits for the other one
    assert (answer.status_code, answer.text) == (503, "process: its event loop does not answer in 0.3 s\n")


async def test_the_command_asks_and_its_status_answers(served: Served) -> None:
    async def command(port: int) -> tuple[int, str]:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "shared.runtime.health", "--metrics-port", str(port)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert await command(served.port) == (1, "process: starting\n")
    await consuming(served)
    assert await command(served.port) == (0, "ok\n")
    status, text = await command(1)
    assert status == 1
    assert text.startswith("nothing answers on port 1: ")
    status, text = await command(0)
    assert status == 2
    assert "set a port" in text


async def test_a_taken_port_is_reported(served: Served) -> None:
    with pytest.raises(SettingsError, match="choose another WISP_METRICS_HOST or WISP_METRICS_PORT"):
        health.serve(served.health, "127.0.0.1", served.port, asyncio.get_running_loop())
