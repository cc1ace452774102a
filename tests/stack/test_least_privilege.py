"""The whole suite with one RabbitMQ user per service, and the operations that these users are refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import httpx
import pytest
from aio_pika.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused
from asking import Case, Client
from patience import HANG_S
from rabbitmqctl import import_definitions, own_rabbitmq, rabbitmqctl, url_of

from services.scheduler.core.drafter_pools import SILENT_MS
from services.scheduler.stand_in import StandIn
from services.tools.cli.suite_address import SuiteAddress
from services.tools.cli.suite_observer import once_seen
from services.tools.local.brokers import Brokers
from services.tools.local.servers import BrokerServer
from services.tools.local.settings import BrokerAddresses
from services.tools.local.stack import Stack
from services.tools.replayer.journal import read
from shared.broker import topology
from shared.broker.access import definitions, user_of
from shared.broker.client import Broker
from shared.broker.topology import ROLES, JournalLimits, Topology
from shared.errors import BrokersError
from shared.state.store import Store

NAMES = Topology("least")
JOURNAL = JournalLimits(20_000_000, 3600)
PASSWORDS = {user_of(NAMES, service): f"{service}-password" for service in ROLES}


@dataclass
class Set:
    """A RabbitMQ with the imported definitions, and the services' addresses."""

    server: BrokerServer
    urls: dict[str, str]


@pytest.fixture(scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Set]:
    folder = tmp_path_factory.mktemp("least")
    async with own_rabbitmq(folder) as server:
        made = definitions(NAMES, PASSWORDS, journal=JOURNAL)
        await import_definitions(server, folder / "definitions.json", made)
        await import_definitions(server, folder / "definitions.json", made)  # again: as after an upgrade
        urls = {service: url_of(server, user, PASSWORDS[user]) for service, user in USERS.items()}
        yield Set(server, urls)


USERS = {service: user_of(NAMES, service) for service in ROLES}


async def test_the_whole_suite_works_with_each_service_under_its_own_user(
    broker: Set, redis_url: str, target_folder: Path, cases: list[Case], tmp_path: Path
) -> None:
    given = BrokerAddresses(amqp_url=broker.server.url, redis_url=redis_url)
    async with (
        Brokers(tmp_path, addresses=given) as brokers,
        Stack(
            "least",
            brokers=brokers,
            namespace=NAMES.namespace,
            target=target_folder,
            schedulers=2,
            verifiers=2,
            env={"WISP_CACHE_TOKENS": "4096", "WISP_ADMISSION": "false", "WISP_JOURNAL": "true"},
            env_of={service: {"WISP_AMQP_URL": url} for service, url in broker.urls.items()},
        ) as stack,
        httpx.AsyncClient(timeout=HANG_S) as http,
    ):
        client = Client(http, stack)
        for draft in ("hidden", "lookup", "none"):
            answers = await client.ask_all(cases[:4], draft)
            assert answers == [case.tokens for case in cases[:4]]
        # The gateway's fleet view: its user may listen to the suite.
        async with http.stream("GET", f"{stack.url.removesuffix('/v1')}/fleet/events") as feed:
            asking = asyncio.create_task(_again_and_again(client, cases[0]))
            async with asyncio.timeout(HANG_S):
                async for line in feed.aiter_lines():
                    if '"kind":"batch"' in line:
                        break
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        # A client that goes away: its Cancel reaches everybody.
        body = client.body(cases[0], "none") | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        async with http.stream("POST", f"{stack.url}/completions", json=body) as stream:
            assert await anext(stream.aiter_lines())
        users = await rabbitmqctl(broker.server, "list_connections", "user", "name")
        for drafter in stack.processes("drafter"):
            await stack.stop(drafter)
        assert await client.ask(cases[0]) == cases[0].tokens, "by a scheduler, as no drafter is left"
        await once_seen(SuiteAddress(broker.urls["top"], NAMES.namespace), _silent(), 1.5, as_json=True)
        logs = "".join(path.read_text() for path in stack.folder.glob("*.log"))
    for trace in ("ACCESS_REFUSED", "access refused", "dead letter lost", "dead-lettered"):
        assert trace.lower() not in logs.lower()
    assert all(user in users for service, user in USERS.items() if service != "top")
    dead = await rabbitmqctl(broker.server, "list_queues", "--silent", "name", "messages")
    assert f"{NAMES.dead}\t0" in dead
    recording = await read(broker.server.url, NAMES.namespace)
    recorded = {entry.message.type_name for entry in recording.entries()}
    assert recorded >= {"Generate", "Verify", "Batch", "Result", "Cancel", "Load"}
    log = (broker.server.processes[0].log.parent / "rabbitmq.log").read_text()
    refused = [line for line in log.splitlines() if "refused for user" in line]
    # Each service tries once whether it may declare the exchange and the shared queues that it serves.
    assert refused
    # Since 4.3 one without a part in the journal finds that out by a publication, which it would roll back.
    asked = r"operation (exchange|queue)\.declare|operation basic\.publish .* exchange 'least\.journal'"
    assert [line for line in refused if not re.search(asked, line)] == []


async def _again_and_again(client: Client, case: Case) -> None:
    while True:
        await client.ask(case)


def _silent() -> object:
    from io import StringIO

    from rich.console import Console

    return Console(file=StringIO())


Act = Callable[[AbstractChannel], Awaitable[object]]


def publishing(exchange: str, key: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        target = await channel.get_exchange(exchange) if exchange else channel.default_exchange
        await target.publish(aio_pika.Message(b"x"), key, mandatory=False)

    return act


def listening(service: str, key: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        own = await channel.declare_queue(f"{NAMES.namespace}.{service}.spy", exclusive=True)
        await own.bind(NAMES.exchange, key)

    return act


def reading(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        found = await channel.get_queue(queue)
        await found.get(fail=False)

    return act


def declaring(queue: str) -> Act:
    return lambda channel: channel.declare_queue(queue, exclusive=True)


def deleting(queue: str) -> Act:
    return lambda channel: channel.queue_delete(queue)


N = NAMES.namespace
FORBIDDEN: list[tuple[str, Act]] = [
    # Nobody but its owner decides: batches come from schedulers, results from verifiers, requests from gateways.
    ("drafter", publishing(N, topology.batch("v"))),
    ("drafter", publishing(N, topology.result("gateway-1"))),
    ("drafter", publishing(N, topology.generate())),
    ("drafter", publishing(N, topology.CANCEL)),
    ("drafter", publishing(N, topology.heartbeat("v"))),
    ("gateway", publishing(N, topology.VERIFY)),
    ("gateway", publishing(N, topology.batch("v"))),
    ("verifier", publishing(N, topology.batch("v"))),
    ("verifier", publishing(N, topology.LOAD)),
    ("scheduler", publishing(N, topology.result("gateway-1"))),
    ("estimator", publishing(N, topology.VERIFY)),
    ("top", publishing(N, topology.CANCEL)),
    ("top", publishing(N, topology.VERIFY)),
    # Past the exchange, straight into a queue.
    ("drafter", publishing("", f"{N}.verifier.v")),
    ("gateway", publishing("", NAMES.verify_queue().name)),
    # Nobody reads what is for others.
    ("drafter", listening("drafter", topology.batch("*"))),
    ("drafter", listening("drafter", "#")),
    ("gateway", listening("gateway", topology.VERIFY)),
    ("gateway", listening("gateway", topology.generate("*"))),
    ("estimator", listening("estimator", topology.result("*"))),
    ("top", listening("top", topology.result("gateway-1"))),
    ("gateway", reading(NAMES.generate_queue().name)),
    ("drafter", reading(NAMES.verify_queue().name)),
    ("verifier", reading(NAMES.generate_queue().name)),
    ("scheduler", reading(NAMES.dead)),
    # Nobody takes another's place, or anything away.
    ("drafter", declaring(f"{N}.verifier.v1")),
    ("gateway", declaring(f"{N}.drafter.d1")),
    ("verifier", declaring("elsewhere")),
    ("scheduler", deleting(NAMES.verify_queue().name)),
    ("drafter", deleting(NAMES.generate_queue().name)),
]


@pytest.mark.parametrize(("service", "act"), FORBIDDEN, ids=range(len(FORBIDDEN)))
async def test_operations_outside_a_services_role_are_refused(broker: Set, service: str, act: Act) -> None:
    async with await aio_pika.connect(broker.urls[service]) as connection:
        channel = await connection.channel()
        async with asyncio.timeout(HANG_S):
            with pytest.raises(ChannelAccessRefused):
                await act(channel)


async def test_a_broker_without_the_definitions_is_reported(broker: Set) -> None:
    with pytest.raises(BrokersError, match="`wisp broker definitions`"):
        await Broker.connect(broker.urls["drafter"], Topology("elsewhere"), "x")
    drafter = await Broker.connect(broker.urls["drafter"], NAMES, "x")
    with pytest.raises(BrokersError, match="`wisp broker definitions`"):
        await drafter.consume(NAMES.generate_queue("unknown"), _nothing, prefetch=1)
    await drafter.close()


async def test_a_scheduler_without_the_permissions_stands_in_for_nobody(broker: Set, redis_url: str) -> None:
    """As after an update, until the new definitions are imported."""
    connection = await Broker.connect(broker.urls["estimator"], NAMES, "s1")
    store = Store.connect(redis_url, NAMES.namespace)
    stand_in = StandIn("s1", ["pool"], 8, connection, store)
    assert await stand_in.join() == []
    await asyncio.sleep(SILENT_MS / 1000 + 0.1)
    assert stand_in.without_drafters() == [], "it cannot know"
    await connection.consume(NAMES.sample_queue(), _nothing)
    await connection.liveness.prove_consumers()
    await connection.close()
    await store.close()


async def test_a_service_may_ask_whether_it_may_publish(broker: Set) -> None:
    drafter = await Broker.connect(broker.urls["drafter"], NAMES, "d1")
    assert await drafter.may_publish(topology.drafter("d1"))
    assert not await drafter.may_publish(topology.batch("v1"))
    assert await drafter.may_publish(topology.VERIFY), "the connection is as before"
    await drafter.close()


async def _nothing(_message: object) -> None: ...
