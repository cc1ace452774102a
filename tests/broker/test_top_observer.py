"""`wisp top` at a real broker: it shows real messages, disturbs no scheduler and survives a broken link."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from io import StringIO

import aio_pika
import builders
import pytest
from aiormq.exceptions import ChannelNotFoundEntity
from link import link_to
from patience import HANG_S
from rich.console import Console

from services.tools.cli import doctor_servers
from services.tools.cli.core.suite_watch import SuiteWatch
from services.tools.cli.suite_address import SuiteAddress
from services.tools.cli.suite_observer import SuiteObserver, live, now_ms, once_seen
from services.tools.local.settings import BrokerAddresses
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import BrokersError, SettingsError
from shared.messages import Message, Slo

JOB = builders.job("s-1", draft=[1], reason="due in 9 ms")
PASSING: list[tuple[Message, str]] = [
    (builders.heartbeat("v", free_tokens=5, total_tokens=10), topology.heartbeat("v")),
    (builders.load(0.5, policy="edf"), topology.LOAD),
    (builders.batch("b", JOB, predicted_ms=10, policy="edf"), topology.batch("v")),
    (
        builders.result("s-1", tokens=[1, 2], verifier="v", batch="b", accepted=1, trimmed_to=1, verify_ms=20),
        topology.RESULT_SCHEDULER,
    ),
    (builders.ended("s-1", tokens=2, slo=Slo(ttft_ms=100.0, tpot_ms=50.0)), topology.ENDED),
]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.05)


@pytest.fixture
async def suite(amqp_url: str, namespace: str) -> AsyncIterator[Broker]:
    """Publishes the services' messages. A verifier's own queue takes its batches, as in service."""
    broker = await Broker.connect(amqp_url, Topology(namespace), "suite")
    yield broker
    await broker.close()


async def speaking(broker: Broker) -> None:
    while True:
        for message, key in PASSING:
            await broker.publish(message, key)
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("others", ["wisp-1", "torch 2.13, cpu AVX2"])
async def test_doctor_reports_a_mixed_fleet_and_nothing_else(
    suite: Broker, amqp_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    monkeypatch.setenv("WISP_NAMESPACE", namespace)
    beats = [builders.heartbeat("v1", arithmetic="wisp-1"), builders.heartbeat("v2", arithmetic=others)]

    async def speak() -> None:
        while True:
            for beat in beats:
                await suite.publish(beat, topology.heartbeat(beat.verifier))
            await asyncio.sleep(0.2)

    talk = asyncio.create_task(speak())
    try:
        found = await doctor_servers.check_fleet(BrokerAddresses(amqp_url=amqp_url))
    finally:
        talk.cancel()
    said = [(one.state, one.found) for one in found]
    mixed = f"of different arithmetic in {namespace}: v1: wisp-1; v2: {others}"
    assert said == ([] if others == "wisp-1" else [("note", mixed)])


async def test_doctor_asks_no_suite_where_none_runs(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_NAMESPACE", "nowhere")
    monkeypatch.setattr(doctor_servers, "running_suites", list)
    assert await doctor_servers.check_fleet(BrokerAddresses(amqp_url=amqp_url)) == []
    assert await doctor_servers.check_fleet(BrokerAddresses()) == []


async def test_a_snapshot_has_the_messages_and_takes_none_from_services(
    suite: Broker, amqp_url: str, namespace: str
) -> None:
    taken: list[Message] = []

    async def take(message: Message) -> None:
        taken.append(message)

    await suite.consume(suite.topology.own_queue("verifier", "v", (topology.batch("v"),)), take)
    talk = asyncio.create_task(speaking(suite))
    console = Console(file=StringIO(), width=80)
    try:
        await once_seen(SuiteAddress(amqp_url, namespace), console, 1.5, as_json=True)
    finally:
        talk.cancel()
    seen = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    assert (seen["namespace"], seen["empty"], seen["scheduler"]["policy"]) == (namespace, False, "edf")
    (verifier,) = seen["verifiers"]
    assert (verifier["name"], verifier["alive"], verifier["cache_used"], verifier["ratio_p50"]) == ("v", True, 0.5, 2)
    assert seen["throughput"]["short"] > 0
    assert seen["goodput"]["short"] > 0
    assert seen["classes"][0]["attainment"] == 1
    assert seen["batches"][0]["jobs"][0]["reason"] == "due in 9 ms"
    assert len(taken) > 1


@pytest.mark.parametrize("show", [partial(once_seen, seconds=1), live], ids=["once", "live"])
async def test_a_mistyped_name_is_refused_and_leaves_nothing_behind(
    amqp_url: str, namespace: str, show: Callable[..., Awaitable[None]]
) -> None:
    with pytest.raises(SettingsError, match=rf"there is no suite '{namespace}' at RabbitMQ at amqp://.*--namespace"):
        await show(SuiteAddress(amqp_url, namespace), Console(file=StringIO(), width=80))
    async with await aio_pika.connect(amqp_url) as connection:
        for exchange in (Topology(namespace).exchange, Topology(namespace).dead):
            with pytest.raises(ChannelNotFoundEntity):
                await (await connection.channel()).declare_exchange(exchange, passive=True)


async def test_a_missing_virtual_host_is_an_error(amqp_url: str, namespace: str) -> None:
    with pytest.raises(BrokersError, match="cannot be used"):
        await once_seen(SuiteAddress(f"{amqp_url.rpartition('/')[0]}/nosuch", namespace), Console(file=StringIO()), 1)


async def test_a_missing_suite_is_reported(suite: Broker, amqp_url: str, namespace: str) -> None:
    console = Console(file=StringIO(), width=80)
    await once_seen(SuiteAddress(amqp_url, namespace), console, 1)
    assert "No message from a scheduler or verifier" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


async def test_a_broken_link_is_reported_and_survived(suite: Broker, amqp_url: str, namespace: str) -> None:
    async with link_to(amqp_url) as link:
        observer = SuiteObserver(SuiteAddress(link.url, namespace))
        listening = asyncio.create_task(observer.keep_listening())
        talk = asyncio.create_task(speaking(suite))
        try:
            await until(lambda: observer.problem is None)
            await link.cut()
            await until(lambda: observer.problem is not None)
            assert "does not answer" in (observer.problem or "")
            assert "@" not in (observer.problem or ""), "no password on the screen"
            await link.mend()
            await until(lambda: observer.problem is None)
            observer.watch = SuiteWatch(now_ms())
            await until(lambda: not observer.watch.snapshot(now_ms()).empty)
        finally:
            for task in (listening, talk):
                task.cancel()
            await asyncio.gather(listening, talk, return_exceptions=True)


async def test_a_missing_broker_is_an_error_at_once_for_a_script(namespace: str) -> None:
    with pytest.raises(BrokersError, match="cannot be used"):
        await once_seen(SuiteAddress("amqp://nobody:secret@127.0.0.1:1/", namespace), Console(file=StringIO()), 1)
