"""A device outside the cluster, over TLS and under its own user, and the limits of a hostile device."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aio_pika
import builders
import httpx
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import AMQPError, ChannelAccessRefused
from asking import Case, Client
from patience import HANG_S
from rabbitmqctl import import_definitions, rabbitmqctl
from secured import Secured, secured

from services.gateway.keys import new_key, render
from services.scheduler.device_queues import PREFETCH
from services.tools.local import logs
from services.tools.local.brokers import Brokers
from services.tools.local.folder import checkout
from services.tools.local.process import Process
from services.tools.local.settings import BrokerAddresses
from services.tools.local.stack import Stack
from shared.broker import topology
from shared.broker.access import DEVICE_LIMITS, definitions, device_definitions, joined, user_of
from shared.broker.client import Broker
from shared.broker.topology import ROLES, ROUNDS_KEPT, Topology, device_name
from shared.messages import (
    Cancel,
    CostModel,
    Failure,
    Generate,
    Job,
    Message,
    Result,
    Sample,
    Status,
    Verify,
    decode,
    encode,
)

NAMES = Topology("edge")
PASSWORDS = {user_of(NAMES, name): f"{name}-password" for name in (*ROLES, "device.ann", "device.bob")}
SECRET = "s" * 40
ROUNDS_PER_S = 100


@dataclass
class Cluster:
    """A stack without drafters, and two devices that may join it."""

    servers: Secured
    stack: Stack
    keys: dict[str, str]
    folder: Path
    certificate: tuple[Path, Path]
    """The devices' client certificate and its key."""

    def url(self, user: str) -> str:
        """Return the URL of RabbitMQ over TLS for a user."""
        return f"amqps://{user}:{PASSWORDS[user]}@{self.servers.amqps_url.rpartition('@')[2]}"

    @property
    def tls(self) -> dict[str, str]:
        cert, key = self.certificate
        return {
            "WISP_TLS_CA_FILE": str(self.servers.authority.file),
            "WISP_TLS_CERT_FILE": str(cert),
            "WISP_TLS_KEY_FILE": str(key),
        }

    @asynccontextmanager
    async def device(self, name: str, **env: str) -> AsyncIterator[Device]:
        """Run `wisp device` on this machine."""
        own = {
            "WISP_NAMESPACE": NAMES.namespace,
            "WISP_DEVICE_NAME": name,
            "WISP_AMQP_URL": self.url(user_of(NAMES, device_name(name))),
            "WISP_GATEWAY_URL": self.stack.url,
            "WISP_API_KEY": self.keys[name],
            "WISP_PORT": "0",
            "WISP_TARGET": str(self.stack.target),
            # No server: a device does not use Redis.
            "WISP_REDIS_URL": "redis://127.0.0.1:1/0",
            **self.tls,
            **env,
        }
        log = self.folder / f"device-{name}-{len(list(self.folder.glob('device-*')))}.log"
        process = await Process.start(
            f"device-{name}",
            [sys.executable, "-m", "services.device"],
            log=log,
            environment={**os.environ, **own},
            folder=checkout(),
        )
        try:
            async with asyncio.timeout(HANG_S):
                while not ((said := logs.find(log, {"serving"})) and logs.find(log, {"ready"})):
                    assert process.alive, process.tail()
                    await asyncio.sleep(0.05)
            yield Device(str(said["url"]), process)
        finally:
            await process.stop()

    @asynccontextmanager
    async def intruder(self, name: str) -> AsyncIterator[AbstractConnection]:
        """Connect as a device's user, without our code."""
        context = ssl.create_default_context(cafile=self.servers.authority.file)
        context.load_cert_chain(*self.certificate)
        url = self.url(user_of(NAMES, device_name(name)))
        async with await aio_pika.connect(url, ssl_context=context) as connection:
            yield connection

    async def purge(self) -> None:
        """Purge requests that no device took."""
        async with await aio_pika.connect(self.servers.amqp_url) as connection:
            channel = await connection.channel()
            for device in ("ann", "bob"):
                await (await channel.get_queue(NAMES.generate_queue(device_name(device)).name)).purge()

    async def ask(self, url: str, case: Case, key: str = "none", **fields: Any) -> httpx.Response:
        body = Client(httpx.AsyncClient(), self.stack).body(case, "auto") | fields
        async with httpx.AsyncClient(timeout=HANG_S, headers={"authorization": f"Bearer {key}"}) as http:
            return await http.post(f"{url}/completions", json=body)


@dataclass
class Device:
    url: str
    process: Process


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [token["id"] for token in answer.json()["wisp"]["tokens"]]


@pytest.fixture(scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, target_folder: Path
) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("edge")
    devices, keys_file = folder / "devices.json", folder / "keys.json"
    devices.write_text('["ann", "bob"]')
    made = {name: new_key(name, datetime.now(UTC), device=name) for name in ("ann", "bob")}
    made["eve"] = new_key("eve", datetime.now(UTC))
    keys_file.write_text(render([key for _, key in made.values()]))
    async with secured(folder, ask=True) as servers:
        parts = [definitions(NAMES, PASSWORDS)]
        parts += [
            device_definitions(NAMES, name, PASSWORDS[user_of(NAMES, device_name(name))]) for name in ("ann", "bob")
        ]
        await import_definitions(servers.rabbitmq, folder / "definitions.json", joined(*parts))
        given = BrokerAddresses(amqp_url=servers.amqp_url, redis_url=redis_url)
        secret = {"WISP_SESSION_SECRET": SECRET}
        login = servers.amqp_url.rpartition("@")[2]
        urls = {name: f"amqp://{user_of(NAMES, name)}:{PASSWORDS[user_of(NAMES, name)]}@{login}" for name in ROLES}
        env_of = {name: {"WISP_AMQP_URL": urls[name]} for name in ROLES}
        env_of["gateway"] |= secret | {"WISP_API_KEYS_FILE": str(keys_file), "WISP_STALL_TIMEOUT_S": "15"}
        env_of["scheduler"] |= secret | {
            "WISP_DEVICES_FILE": str(devices),
            "WISP_DEVICE_ROUNDS_PER_S": str(ROUNDS_PER_S),
            # Drafts of a tiny model never pay; here they are sent all the same.
            "WISP_WITHOUT": '["runs"]',
        }
        env_of["verifier"] |= secret | {"WISP_PROFILE": "false", "WISP_THREADS": "1"}
        async with (
            Brokers(folder, addresses=given) as brokers,
            Stack(
                "edge",
                brokers=brokers,
                namespace=NAMES.namespace,
                target=target_folder,
                drafters=0,
                env={"WISP_CACHE_TOKENS": "4096", "WISP_ADMISSION": "false"},
                env_of=env_of,
            ) as stack,
        ):
            keys = {name: text for name, (text, _) in made.items()}
            yield Cluster(servers, stack, keys, folder, servers.authority.issue("device"))


async def test_a_device_drafts_for_itself_and_gets_the_targets_text(cluster: Cluster, cases: list[Case]) -> None:
    async with cluster.device("ann") as device:
        answers = await asyncio.gather(*(cluster.ask(device.url, case) for case in cases[:5]))
        assert [tokens(answer) for answer in answers] == [case.tokens for case in cases[:5]]
        summaries = [answer.json()["wisp"]["summary"] for answer in answers]
        assert sum(summary["accepted"] for summary in summaries) > 0, "the target accepted drafts of the device"
        ready = logs.find(device.process.log, {"ready"})
        assert ready is not None
        assert ready["default"] == "combined", "the device receives hidden states"
        # A request with another device's key does not reach this device. One with a key of no device does not either: a
        # scheduler stands in for the drafters that this suite lacks.
        others = (cluster.ask(cluster.stack.url, cases[0], cluster.keys[name]) for name in ("bob", "eve"))
        refused, undrafted = await asyncio.gather(*others)
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
        assert tokens(undrafted) == cases[0].tokens
        assert undrafted.json()["wisp"]["summary"]["accepted"] == 0
        aimed = await cluster.ask(
            cluster.stack.url, cases[0], cluster.keys["eve"], wisp={"pool": device_name("ann"), "trace": True}
        )
        assert aimed.status_code == 400


async def test_a_restarted_device_continues_from_the_committed_tokens(cluster: Cluster, cases: list[Case]) -> None:
    case = cases[0]
    slow = {"WISP_DRAFT_SOURCE": "lookup", "WISP_DEVICE_PROFILE": "raspberry-pi-5"}
    async with collecting(cluster) as collected, cluster.device("ann", **slow) as first:
        # Sent to the gateway directly, so that the client outlives the device.
        asking = asyncio.create_task(cluster.ask(cluster.stack.url, case, cluster.keys["ann"]))
        async with asyncio.timeout(HANG_S):
            while sum(bool(result.tokens) for result in collected) < 2:  # noqa: ASYNC110 - the listener gives no signal
                await asyncio.sleep(0.01)
        os.kill(first.process.pid, signal.SIGKILL)
        await first.process.wait()
    assert not asking.done()
    async with cluster.device("ann", WISP_DRAFT_SOURCE="lookup"):
        assert tokens(await asking) == case.tokens


Act = Callable[[AbstractChannel], Awaitable[object]]
N = NAMES.namespace


def publishing(exchange: str, key: str, cc: list[str] | None = None) -> Act:
    async def act(channel: AbstractChannel) -> None:
        target = await channel.get_exchange(exchange) if exchange else channel.default_exchange
        headers = {"CC": cc} if cc else None
        await target.publish(aio_pika.Message(b"x", headers=headers), key, mandatory=False)  # type: ignore[arg-type]

    return act


def listening(key: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        own = await channel.declare_queue(f"{N}.device.ann", exclusive=True)
        await own.bind(NAMES.exchange, key)

    return act


def reading(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await (await channel.get_queue(queue)).get(fail=False)

    return act


async def _tap(channel: AbstractChannel) -> None:
    """Bind the exchange to one that the device may write to."""
    own = await channel.get_exchange(NAMES.rounds_exchange("ann"))
    await own.bind(NAMES.exchange, "#")


async def _dead_letter(channel: AbstractChannel) -> None:
    """Let the broker dead-letter expired messages to an exchange that the device may not write to."""
    await channel.declare_queue(
        f"{N}.device.ann", exclusive=True, arguments={"x-dead-letter-exchange": N, "x-message-ttl": 1}
    )


FORBIDDEN: list[tuple[str, Act]] = [
    ("commit: batches", publishing(N, topology.batch("verifier-1"))),
    ("commit: results", publishing(N, topology.result("gateway-1"))),
    ("rounds past the gate", publishing(N, topology.VERIFY)),
    ("cancel", publishing(N, topology.CANCEL)),
    ("requests", publishing(N, topology.generate(device_name("bob")))),
    ("heartbeats", publishing(N, topology.heartbeat("v"))),
    ("probes", publishing(N, topology.probe_key(f"{N}.device.ann"))),
    ("dead letters", publishing(NAMES.dead, "")),
    ("another's rounds", publishing(NAMES.rounds_exchange("bob"), "")),
    ("past the exchanges", publishing("", NAMES.verify_queue().name)),
    ("everything", listening("#")),
    ("another's results", listening(topology.result(device_name("bob")))),
    ("a gateway's results", listening(topology.result("gateway-1"))),
    ("rounds", listening(topology.VERIFY)),
    ("batches", listening(topology.batch("*"))),
    ("requests of all", listening(topology.generate("*"))),
    ("who is cancelled", listening(topology.CANCEL)),
    ("a tap", _tap),
    ("a tap by dead letters", _dead_letter),
    ("another's requests", reading(NAMES.generate_queue(device_name("bob")).name)),
    ("the pool's requests", reading(NAMES.generate_queue().name)),
    ("its own rounds, read", reading(NAMES.rounds_queue("ann").name)),
    ("another's rounds, read", reading(NAMES.rounds_queue("bob").name)),
    ("all rounds", reading(NAMES.verify_queue().name)),
    ("the dead", reading(NAMES.dead)),
    ("another's queue", lambda channel: channel.declare_queue(f"{N}.device.bob", exclusive=True)),
    ("a gateway's queue", lambda channel: channel.declare_queue(f"{N}.gateway.g", exclusive=True)),
    ("any queue", lambda channel: channel.declare_queue("", exclusive=True)),
    ("an exchange", lambda channel: channel.declare_exchange("x")),
    ("delete", lambda channel: channel.queue_delete(NAMES.rounds_queue("ann").name)),
    ("purge", lambda channel: _purge(channel, NAMES.rounds_queue("bob").name)),
]


async def _purge(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue)).purge()


@pytest.mark.parametrize(("what", "act"), FORBIDDEN, ids=[what for what, _ in FORBIDDEN])
async def test_the_broker_refuses_a_device_everything_but_its_own(cluster: Cluster, what: str, act: Act) -> None:
    async with cluster.intruder("ann") as connection:
        channel = await connection.channel()
        async with asyncio.timeout(HANG_S):
            with pytest.raises(ChannelAccessRefused):
                await act(channel)


async def test_the_connections_of_a_device_are_limited(cluster: Cluster) -> None:
    async with AsyncExitStack() as opened:
        for _ in range(DEVICE_LIMITS["max-connections"]):
            await opened.enter_async_context(cluster.intruder("ann"))
        with pytest.raises((AMQPError, OSError)):
            await opened.enter_async_context(cluster.intruder("ann"))


@asynccontextmanager
async def collecting(cluster: Cluster) -> AsyncIterator[list[Result]]:
    """Collect the results that schedulers receive, as a user who may read them."""
    collected: list[Result] = []

    async def receive(message: Message) -> None:
        if isinstance(message, Result):
            collected.append(message)

    broker = await Broker.connect(cluster.servers.amqp_url, NAMES, "spy")
    await broker.consume(NAMES.own_queue("spy", "1", (topology.RESULT_SCHEDULER,)), receive)
    yield collected
    await broker.close()


async def _given(channel: AbstractChannel, device: str) -> Generate:
    """Return the next request from the device's queue."""
    queue = await channel.get_queue(NAMES.generate_queue(device_name(device)).name)
    async with asyncio.timeout(HANG_S):
        while (incoming := await queue.get(fail=False)) is None:  # noqa: ASYNC110 - polls like an intruder
            await asyncio.sleep(0.02)
    await incoming.ack()
    message = decode(incoming.body)
    assert isinstance(message, Generate)
    return message


def first_round(generate: Generate, **fields: Any) -> Verify:
    base = {
        "session": generate.session,
        "round": 0,
        "base_len": len(generate.prompt),
        "draft": [],
        "acceptance": [],
        "drafter": device_name("ann"),
        "gateway": generate.gateway,
        "fingerprint": generate.fingerprint,
        "tpot_ms": generate.slo.tpot_ms if generate.slo else None,
        "service_class": generate.service_class,
        "session_key": generate.session_key,
    }
    return Verify.model_validate(base | fields)


async def test_a_device_cannot_read_or_change_another_devices_session(cluster: Cluster, cases: list[Case]) -> None:
    """This holds even for a device that has everything of that session except its key."""
    await cluster.purge()
    async with (
        cluster.intruder("ann") as connection,
        cluster.intruder("bob") as victim,
        collecting(cluster) as collected,
    ):
        channel, his = await connection.channel(), await victim.channel()
        mine = await channel.declare_queue(f"{N}.device.ann", exclusive=True)
        await mine.bind(NAMES.exchange, topology.result(device_name("ann")))
        out = await channel.get_exchange(NAMES.rounds_exchange("ann"))
        asking_ann = asyncio.create_task(cluster.ask(cluster.stack.url, cases[1], cluster.keys["ann"]))
        asking_bob = asyncio.create_task(cluster.ask(cluster.stack.url, cases[0], cluster.keys["bob"]))
        own, others = await _given(channel, "ann"), await _given(his, "bob")
        attempts: list[Message] = [
            first_round(others, session_key=""),
            first_round(others, session_key="0" * 32),
            first_round(others, session_key=own.session_key),
            first_round(others, session_key=own.session_key, drafter=device_name("bob")),
            # The key of the device's own session, for a session that the gateway did not give it.
            first_round(own, service_class="priority"),
            first_round(own, tpot_ms=0.001, slack_ms=-1e9),
            first_round(own, gateway="device.ann"),
            first_round(own, drafter=device_name("bob")),
            first_round(own, drafter=others.gateway),
            # Messages of other services.
            Cancel(session=others.session, reason="hostile"),
            _result(others),
            builders.batch("b1", _job(others)),
            builders.heartbeat("evil", fingerprint=own.fingerprint, free_tokens=10**6, total_tokens=10**6),
            CostModel(
                verifier="verifier-1",
                coefficients=[0.0] * 5,
                ratio_p50=1,
                ratio_p90=1,
                ratio_p99=1,
                samples=9,
                version=9,
            ),
            Sample.model_validate(
                {"verifier": "verifier-1", "batches": [{"shape": _SHAPE, "measured_ms": 0.0}], "profile": True}
            ),
        ]
        for message in attempts:
            await out.publish(aio_pika.Message(encode(message)), "")
        for body in (b"", b"rubbish", b"\x80" * 70_000, b"\xdd\xff\xff\xff\xff"):
            await out.publish(aio_pika.Message(body, headers={"CC": [topology.CANCEL]}), topology.CANCEL)
        await asyncio.sleep(1.5)
        assert collected == [], "no round became a batch"
        assert await mine.get(fail=False) is None, "no answer arrived"
        # Both sessions go on unharmed, also that of the hostile device once it behaves.
        await _serve(channel, mine, own, "ann", draft=[5, 5, 5])
        assert tokens(await asking_ann) == cases[1].tokens
        # The other session was never started: its own drafter takes it.
        his_queue = await his.declare_queue(f"{N}.device.bob", exclusive=True)
        await his_queue.bind(NAMES.exchange, topology.result(device_name("bob")))
        await _serve(his, his_queue, others, "bob", draft=[])
        assert tokens(await asking_bob) == cases[0].tokens
        assert {result.session for result in collected} == {own.session, others.session}
    dead = await rabbitmqctl(cluster.servers.rabbitmq, "list_queues", "--silent", "name", "messages")
    assert f"{NAMES.dead}\t0" in dead, "a device cannot fill the dead-letter queue"


_SHAPE = {"jobs": 1, "new_tokens": 1, "new_context": 1, "context": 1}


def _job(generate: Generate) -> Job:
    return builders.job(
        generate.session,
        base_len=len(generate.prompt),
        drafter=device_name("ann"),
        gateway=generate.gateway,
        fingerprint=generate.fingerprint,
    )


def _result(generate: Generate) -> Result:
    error = Failure(code="cancelled", message="hostile")
    return builders.result(generate.session, base_len=len(generate.prompt), status=Status.FAILED, error=error)


async def _serve(channel: AbstractChannel, inbox: Any, generate: Generate, device: str, draft: list[int]) -> None:
    """Serve a session to its end by hand, with the same draft in every round."""
    out = await channel.get_exchange(NAMES.rounds_exchange(device))
    length, number = len(generate.prompt), 0
    while True:
        sent = first_round(generate, round=number, base_len=length, draft=draft, acceptance=[0.9] * len(draft))
        sent = sent.model_copy(update={"drafter": device_name(device)})
        await out.publish(aio_pika.Message(encode(sent)), "")
        async with asyncio.timeout(HANG_S):
            while True:
                incoming = await inbox.get(fail=False, no_ack=True)
                if incoming is None:
                    await asyncio.sleep(0.01)
                    continue
                result = decode(incoming.body)
                if isinstance(result, Result) and result.round == number:
                    break
        assert result.status is Status.COMMITTED, result
        length, number = result.base_len + len(result.tokens), number + 1
        if result.finish is not None:
            return


async def test_a_flood_of_rounds_harms_no_other_session(cluster: Cluster, cases: list[Case]) -> None:
    await cluster.purge()
    async with cluster.intruder("ann") as connection, collecting(cluster) as collected:
        channel = await connection.channel(publisher_confirms=False)
        asking_ann = asyncio.create_task(cluster.ask(cluster.stack.url, cases[1], cluster.keys["ann"], stream=False))
        own = await _given(channel, "ann")
        out = await channel.get_exchange(NAMES.rounds_exchange("ann"))
        flood = [
            aio_pika.Message(encode(first_round(own, round=number, draft=[7] * 8, acceptance=[1.0] * 8)))
            for number in range(50)
        ]
        flood.append(aio_pika.Message(b"rubbish"))
        sent, waiting, flooding = 0, [], True

        async def keep_flooding() -> None:
            nonlocal sent
            while flooding:
                for message in flood:
                    await out.publish(message, "")
                    sent += 1
                await asyncio.sleep(0)

        started = time.monotonic()
        async with cluster.device("bob", WISP_DRAFT_SOURCE="lookup") as bob:
            attack = asyncio.create_task(keep_flooding())
            await asyncio.sleep(1)
            answers = await asyncio.gather(*(cluster.ask(bob.url, case) for case in cases[2:6]))
            assert [tokens(answer) for answer in answers] == [case.tokens for case in cases[2:6]]
            waiting = await rabbitmqctl(cluster.servers.rabbitmq, "list_queues", "--silent", "name", "messages")
            flooding = False
            await attack
        lengths = dict(line.split("\t") for line in waiting.splitlines())
        assert sent > 2000, "the device flooded its queue"
        # The queue's limit excludes messages on their way to the scheduler.
        assert int(lengths[NAMES.rounds_queue("ann").name]) <= ROUNDS_KEPT + PREFETCH
        assert int(lengths[NAMES.dead]) == 0
        taken = sum(result.session == own.session for result in collected)
        assert 0 < taken <= ROUNDS_PER_S * (time.monotonic() - started + 2), "rounds above the limit are dropped"
        asking_ann.cancel()


async def test_a_device_removed_from_the_list_is_ignored(cluster: Cluster, cases: list[Case]) -> None:
    devices = cluster.folder / "devices.json"
    scheduler = cluster.stack.processes("scheduler")[0].log
    devices.write_text("rubbish")
    await asyncio.sleep(1.5)
    devices.write_text('["ann"]')
    async with asyncio.timeout(HANG_S):
        while not logs.find(scheduler, {"device left"}):  # noqa: ASYNC110 - another process gives no signal
            await asyncio.sleep(0.05)
    assert logs.find(scheduler, {"devices file not read, keeping the last devices"})
    async with cluster.device("ann", WISP_DRAFT_SOURCE="lookup") as ann:
        assert tokens(await cluster.ask(ann.url, cases[7])) == cases[7].tokens
    devices.write_text('["ann", "bob"]')
    async with cluster.device("bob", WISP_DRAFT_SOURCE="lookup") as bob:
        assert tokens(await cluster.ask(bob.url, cases[8])) == cases[8].tokens
