"""Publishing, consuming and dead letters, on a real RabbitMQ: the contract, and what only RabbitMQ has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any
from unittest.mock import AsyncMock

import aio_pika
import aiormq
import pytest
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from broker_contract import BrokerContract, Connect, Inbox
from builders import generate, result, verify
from gateway_peer import eventually
from link import link_to
from patience import HANG_S
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from shared.broker import client, declarations, topology
from shared.broker.client import Broker
from shared.broker.incoming import GiveBack
from shared.broker.liveness import PROBE_HEADER
from shared.broker.topology import Topology
from shared.errors import BrokersError, QueueDown
from shared.messages import Cancel, Message, Result, decode, encode


@pytest.fixture
async def connect(amqp_url: str, namespace: str) -> AsyncIterator[Connect]:
    brokers: list[Broker] = []

    async def make(name: str) -> Broker:
        brokers.append(await Broker.connect(amqp_url, Topology(namespace), name))
        return brokers[-1]

    yield make
    for broker in brokers:
        await broker.close()


async def dead_letters(amqp_url: str, namespace: str, count: int) -> list[aio_pika.abc.AbstractIncomingMessage]:
    """Wait for this many dead letters; with 0, return those that there are."""
    async with await aio_pika.connect(amqp_url) as connection, asyncio.timeout(HANG_S):
        queue = await (await connection.channel()).get_queue(f"{namespace}.dead")
        found: list[aio_pika.abc.AbstractIncomingMessage] = []
        while True:
            message = await queue.get(no_ack=True, fail=False)
            if message is not None:
                found.append(message)
            elif len(found) >= count:
                return found
            else:
                await asyncio.sleep(0.05)


class TestRabbitMQ(BrokerContract):
    """The contract's cases, over `connect`."""


def _received() -> float:
    return REGISTRY.get_sample_value("wisp_messages_received_total", {"type": "Result"}) or 0.0


async def test_a_group_is_one_message_and_reaches_each_handler_result_by_result(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    verifier, drafter, gateway = await connect("v1"), await connect("d1"), await connect("g1")
    at_drafter, at_gateway = Inbox(), Inbox()
    await drafter.consume(drafter.topology.own_queue("drafter", "d1", (topology.result("d1"),)), at_drafter)
    await gateway.consume(gateway.topology.own_queue("gateway", "g1", (topology.result("g1"),)), at_gateway)
    results = [result(f"s{i}", 1, 3, [i]) for i in range(3)]
    received = _received()
    await verifier.publish_group(results, topology.result("d1"), cc=(topology.result("g1"),))
    for inbox in (at_drafter, at_gateway):
        assert [await inbox.next() for _ in results] == results
    assert _received() == received + 2


async def test_a_result_of_a_group_whose_handler_fails_does_not_keep_the_others(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    handled: list[str] = []

    async def handle(message: Message) -> None:
        assert isinstance(message, Result)
        if message.session == "s0":
            raise RuntimeError("broken")
        handled.append(message.session)

    broker = await connect("d1")
    await broker.consume(broker.topology.own_queue("drafter", "d1", (topology.result("d1"),)), handle)
    await broker.publish_group([result(f"s{i}", 1, 3, [i]) for i in range(3)], topology.result("d1"))
    await eventually(lambda: handled == ["s1", "s2"])
    (letter,) = await dead_letters(amqp_url, namespace, 1)
    assert "broken" in str(letter.headers["x-wisp-reason"])


async def test_only_one_scheduler_gets_rounds_and_a_standby_takes_over(connect: Connect) -> None:
    first, second, sender = await connect("first"), await connect("second"), await connect("sender")
    active, standby = Inbox(), Inbox()
    await first.consume(first.topology.verify_queue(), active)
    await second.consume(second.topology.verify_queue(), standby)
    for i in range(10):
        await sender.publish(verify(f"a{i}"), topology.VERIFY)
    for _ in range(10):
        await active.next()
    assert await standby.nothing_more()
    await first.close()
    await sender.publish(verify("b"), topology.VERIFY)
    assert await standby.next() == verify("b")


async def test_a_request_whose_drafter_dies_goes_to_another(connect: Connect) -> None:
    first, second, sender = await connect("first"), await connect("second"), await connect("sender")
    started = asyncio.Event()

    async def never_ends(message: Message) -> None:
        started.set()
        await asyncio.Event().wait()

    await first.consume(first.topology.generate_queue(), never_ends, prefetch=4)
    await sender.publish(generate(), topology.generate(), persistent=True)
    await asyncio.wait_for(started.wait(), HANG_S)
    other = Inbox()
    await second.consume(second.topology.generate_queue(), other, prefetch=4)
    assert await other.nothing_more()
    await first.close()
    assert await other.next() == generate()


async def test_a_consumer_of_lower_priority_gets_the_overflow(connect: Connect) -> None:
    drafter, stand_in, sender = await connect("drafter"), await connect("stand-in"), await connect("sender")
    names = sender.topology
    taken: list[str] = []

    def holding(name: str) -> Callable[[Message], Awaitable[None]]:
        async def hold(message: Message) -> None:
            taken.append(name)
            await asyncio.Event().wait()

        return hold

    await stand_in.consume(names.generate_queue(), holding("stand-in"), prefetch=9, priority=-1)
    await sender.publish(generate("alone"), topology.generate(), persistent=True)
    await eventually(lambda: taken == ["stand-in"])
    await drafter.consume(names.generate_queue(), holding("drafter"), prefetch=3)
    for i in range(5):
        await sender.publish(generate(f"s{i}"), topology.generate(), persistent=True)
    await eventually(lambda: taken == ["stand-in", *3 * ["drafter"], *2 * ["stand-in"]])
    await drafter.close()
    await eventually(lambda: taken[6:] == 3 * ["stand-in"])


async def test_a_message_given_back_goes_to_the_consumer_of_higher_priority(connect: Connect, amqp_url: str) -> None:
    drafter, stand_in, sender = await connect("drafter"), await connect("stand-in"), await connect("sender")
    names, release, given = sender.topology, asyncio.Event(), Inbox()

    async def hold(message: Message) -> None:
        await given(message)
        await release.wait()
        raise GiveBack

    await stand_in.consume(names.generate_queue(), hold, prefetch=4, priority=-1)
    for i in range(3):
        await sender.publish(generate(f"s{i}"), topology.generate(), persistent=True)
    held = [await given.next() for _ in range(3)]
    inbox = Inbox()
    await drafter.consume(names.generate_queue(), inbox, prefetch=4)
    assert await inbox.nothing_more()
    release.set()
    assert sorted([await inbox.next() for _ in range(3)], key=str) == sorted(held, key=str)
    assert await inbox.nothing_more()
    assert await given.nothing_more()
    assert await dead_letters(amqp_url, names.namespace, 0) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xc1 no msgpack", "not msgpack"),
        (b"", "not msgpack"),
        (b"\x01", "expected a msgpack map"),
        (b"\x81\xa1t\xa4Nope", "unknown message type 'Nope'"),
        (b"\x82\xa1t\xa6Verify\xa1v\x01", "Verify: session: Field required"),
    ],
)
@pytest.mark.parametrize("prefetch", [0, 4], ids=["transient", "persistent"])
async def test_an_undecodable_message_is_dead_lettered_and_the_next_is_handled(
    connect: Connect, amqp_url: str, namespace: str, body: bytes, reason: str, prefetch: int
) -> None:
    broker = await connect("reader")
    inbox = Inbox()
    queue = broker.topology.generate_queue() if prefetch else broker.topology.verify_queue()
    await broker.consume(queue, inbox, prefetch=prefetch)
    async with await aio_pika.connect(amqp_url) as other:
        exchange = await (await other.channel()).get_exchange(namespace)
        await exchange.publish(aio_pika.Message(body, headers={"x-from": "a test"}), queue.bindings[0])
    (dead,) = await dead_letters(amqp_url, namespace, 1)
    assert dead.body == body
    assert reason in str(dead.headers["x-wisp-reason"])
    assert dead.headers["x-from"] == "a test"
    assert dead.headers["x-wisp-routing-key"] == queue.bindings[0]
    good = generate() if prefetch else verify()
    await broker.publish(good, queue.bindings[0])
    assert await inbox.next() == good


async def test_a_message_whose_handler_fails_is_dead_lettered(connect: Connect, amqp_url: str, namespace: str) -> None:
    broker = await connect("reader")

    async def fails(message: Message) -> None:
        raise ZeroDivisionError("a bug")

    await broker.consume(broker.topology.verify_queue(), fails)
    await broker.publish(verify(), topology.VERIFY)
    (dead,) = await dead_letters(amqp_url, namespace, 1)
    assert "a bug" in str(dead.headers["x-wisp-reason"])
    assert dead.body == encode(verify())


async def test_fields_of_a_newer_version_are_ignored(connect: Connect, amqp_url: str, namespace: str) -> None:
    import msgpack

    broker = await connect("reader")
    inbox = Inbox()
    await broker.consume(broker.topology.own_queue("test", "x", (topology.CANCEL,)), inbox)
    body = msgpack.packb({"t": "Cancel", "v": 2, "session": "s", "reason": "r", "brand_new": {"a": 1}})
    async with await aio_pika.connect(amqp_url) as other:
        exchange = await (await other.channel()).get_exchange(namespace)
        await exchange.publish(aio_pika.Message(body), topology.CANCEL)
    assert await inbox.next() == Cancel(session="s", reason="r")


async def test_prove_passes_for_a_live_consumer_and_fails_for_a_missing_one(connect: Connect) -> None:
    broker = await connect("reader")
    queue = broker.topology.own_queue("test", "x", ())
    inbox = Inbox()
    await broker.consume(queue, inbox)
    await broker.liveness.prove(queue)
    with pytest.raises(BrokersError, match="does not answer"):
        await broker.liveness.prove(broker.topology.own_queue("test", "nobody", ()), timeout_s=0.3)
    assert await inbox.nothing_more(), f"probes ({PROBE_HEADER}) must not reach the handler"


async def test_a_deleted_queue_of_a_process_is_made_again_for_it_alone(connect: Connect) -> None:
    broker, other = await connect("reader"), await connect("other")
    queue = broker.topology.own_queue("test", "x", ())
    await broker.consume(queue, Inbox())
    channel = await broker._connection.channel()
    await channel.queue_delete(queue.name)

    async with asyncio.timeout(HANG_S):
        while True:
            with suppress(BrokersError):
                await broker.liveness.prove(queue, timeout_s=0.5)
                break
    channel = await other._connection.channel()
    with pytest.raises(aiormq.exceptions.ChannelLockedResource):
        await channel.declare_queue(queue.name, passive=True)


async def test_a_second_process_of_the_same_name_is_refused(
    connect: Connect, amqp_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.broker.declarations.OWN_QUEUE_RETRIES", 2)
    first, second = await connect("same"), await connect("same")
    await first.consume(first.topology.own_queue("verifier", "same", ()), Inbox())
    with pytest.raises(BrokersError, match="WISP_INSTANCE"):
        await second.consume(second.topology.own_queue("verifier", "same", ()), Inbox())
    await first.close()
    with suppress(BrokersError):
        await second.consume(second.topology.own_queue("verifier", "same", ()), Inbox())


async def test_an_unreachable_broker_is_an_error_without_the_password(
    namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Services often start before RabbitMQ: nothing is logged until it listens."""
    monkeypatch.setattr("shared.broker.client.CONNECT_TIMEOUT_S", 0.5)
    with pytest.raises(BrokersError, match=r"127\.0\.0\.1:1/ \(Connection refused\); .*WISP_AMQP_URL") as caught:
        await Broker.connect("amqp://guest:secret@127.0.0.1:1/", Topology(namespace), "x")
    assert "secret" not in str(caught.value)
    assert not caplog.records


async def reconnected(broker: Broker) -> None:
    """Wait for the end of the next reconnect."""
    done = asyncio.Event()
    broker.on_reconnect(done.set)
    await asyncio.wait_for(done.wait(), HANG_S)


async def test_the_first_address_that_answers_is_used(amqp_url: str, namespace: str) -> None:
    broker = await Broker.connect(f"amqp://guest:guest@127.0.0.1:1/,{amqp_url}", Topology(namespace), "x")
    assert broker.connected
    await broker.close()


async def test_a_lost_connection_goes_on_at_the_next_address(amqp_url: str, namespace: str) -> None:
    async with link_to(amqp_url) as first, link_to(amqp_url) as second:
        broker = await Broker.connect(f"{first.url}, {second.url}", Topology(namespace), "x")
        queue = broker.topology.own_queue("test", "x", ())
        await broker.consume(queue, Inbox())
        for gone, back in ((first, second), (second, first)):
            returning = asyncio.create_task(reconnected(broker))
            await gone.cut()
            await returning
            await broker.liveness.prove(queue)
            await gone.mend()
            assert back is not gone
        await broker.close()


async def test_an_address_that_falls_silent_is_given_up_for_another(amqp_url: str, namespace: str) -> None:
    async with link_to(amqp_url) as first, link_to(amqp_url) as second:
        broker = await Broker.connect(f"{first.url}, {second.url}", Topology(namespace), "x")
        queue = broker.topology.own_queue("test", "x", ())
        await broker.consume(queue, Inbox())
        with capture_logs() as logs:
            first.flowing.clear()
            await reconnected(broker)
        assert "RabbitMQ is silent, connection given up" in [log["event"] for log in logs], "before the client library"
        await broker.liveness.prove(queue)
        await broker.close()


async def test_an_idle_connection_to_one_of_several_addresses_stays(amqp_url: str, namespace: str) -> None:
    async with link_to(amqp_url) as first, link_to(amqp_url) as second:
        urls = ", ".join(f"{link.url}?heartbeat=1" for link in (first, second))
        broker = await Broker.connect(urls, Topology(namespace), "x")
        lost = asyncio.create_task(reconnected(broker))
        await asyncio.sleep(3.5)  # longer than the silence after which an address is given up
        assert broker.connected
        assert not lost.done()
        lost.cancel()
        await broker.close()


async def test_an_own_queue_that_a_dead_connection_still_holds_gets_a_fresh_name(amqp_url: str, namespace: str) -> None:
    async with link_to(amqp_url) as link:
        broker = await Broker.connect(link.url, Topology(namespace), "x")
        queue, inbox = broker.topology.own_queue("drafter", "d", (topology.result("d"),)), Inbox()
        await broker.consume(queue, inbox)
        returning = asyncio.create_task(reconnected(broker))
        await link.cut(unnoticed=True)
        await link.mend()
        await asyncio.wait_for(returning, 15)  # RabbitMQ notices the dead connection after 20 s
        await broker.liveness.prove(queue)
        await broker.publish(result(), topology.result("d"))
        assert (await inbox.next()) == result()
        assert await inbox.nothing_more()
        await broker.close()


async def test_a_queue_keeps_its_name_when_only_its_channel_is_opened_again(connect: Connect) -> None:
    broker = await connect("x")
    queue, inbox = broker.topology.own_queue("test", "x", ()), Inbox()
    await broker.consume(queue, inbox)
    declared = broker._queues[queue.name]
    channel = await declared.channel.get_underlay_channel()
    with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
        await channel.queue_declare(f"{queue.name}-missing", passive=True)
    async with asyncio.timeout(HANG_S):
        while True:
            with suppress(BrokersError):
                await broker.liveness.prove(queue, timeout_s=0.3)
                break
    assert declared.name == queue.name, "the queue of this connection would fill up, with nobody to read it"


async def test_a_persistent_message_is_repeated_while_the_connection_is_restored(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    drafter, inbox = await connect("drafter"), Inbox()
    await drafter.consume(drafter.topology.generate_queue(), inbox, prefetch=1)
    async with link_to(amqp_url) as link:
        broker = await Broker.connect(link.url, Topology(namespace), "gateway")
        await link.cut()
        publishing = asyncio.create_task(broker.publish(generate("s"), topology.generate(), persistent=True))
        await asyncio.sleep(0.5)
        await link.mend()
        await publishing
        assert (await inbox.next()) == generate("s")
        await broker.close()


def open_channels(broker: Broker) -> int:
    transport = broker._connection.transport
    assert transport is not None
    return sum(channel is not None for channel in transport.connection.channels.values())  # type: ignore[attr-defined]


async def test_a_refused_message_is_repeated_on_a_new_channel(
    connect: Connect, amqp_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await connect("gateway")
    used: list[int] = []
    publish = aio_pika.Exchange.publish

    async def record(exchange: aio_pika.Exchange, *args: Any, **kwargs: Any) -> Any:
        used.append((await exchange.channel.get_underlay_channel()).number)
        return await publish(exchange, *args, **kwargs)

    monkeypatch.setattr(aio_pika.Exchange, "publish", record)
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        full = await channel.declare_queue(
            f"{namespace}.full",
            arguments={"x-max-length": 1, "x-overflow": "reject-publish"},
            auto_delete=False,
            exclusive=True,
        )
        await full.bind(broker.topology.exchange, topology.generate())
        await broker.publish(generate("first"), topology.generate(), persistent=True)
        before = open_channels(broker)
        waiting = [
            asyncio.create_task(broker.publish(generate(name), topology.generate(), persistent=True))
            for name in ("second", "third")
        ]
        await eventually(lambda: len(set(used)) > 3)
        assert not any(task.done() for task in waiting)
        await full.purge()
        await asyncio.wait(waiting, timeout=HANG_S, return_when=asyncio.FIRST_COMPLETED)
        await full.purge()
        await asyncio.wait_for(asyncio.gather(*waiting), HANG_S)
        received = await full.get(no_ack=True, timeout=HANG_S)
    assert len(set(used)) > 3, "a refused message went through the channel that RabbitMQ refuses"
    assert decode(received.body) in (generate("second"), generate("third"))
    async with asyncio.timeout(HANG_S):
        while open_channels(broker) != before:  # noqa: ASYNC110 replaced channels are closed in the background
            await asyncio.sleep(0.05)


async def test_an_unconfirmed_message_is_repeated_on_a_new_channel(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel that waits for a dead node does not even answer that it closes."""
    monkeypatch.setattr("shared.broker.client.CONFIRM_S", 0.5)
    monkeypatch.setattr("shared.broker.confirmed.OPEN_S", HANG_S)
    drafter, broker, inbox = await connect("drafter"), await connect("gateway"), Inbox()
    await drafter.consume(drafter.topology.generate_queue(), inbox, prefetch=1)
    first = broker._exchanges.confirmed._current.exchange
    publish = aio_pika.Exchange.publish

    async def ignored(exchange: aio_pika.Exchange, *args: Any, **kwargs: Any) -> Any:
        if exchange is first:
            await asyncio.sleep(HANG_S)
        return await publish(exchange, *args, **kwargs)

    async def unanswered() -> None:
        await asyncio.sleep(HANG_S)

    monkeypatch.setattr(aio_pika.Exchange, "publish", ignored)
    monkeypatch.setattr(first.channel, "close", unanswered)
    await broker.publish(generate("s"), topology.generate(), persistent=True)
    assert (await inbox.next()) == generate("s")


async def test_no_message_is_repeated_while_others_are_confirmed(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated messages would make a busy RabbitMQ busier."""
    monkeypatch.setattr("shared.broker.client.CONFIRM_S", 2.0)
    drafter, broker, inbox = await connect("drafter"), await connect("gateway"), Inbox()
    await drafter.consume(drafter.topology.generate_queue(), inbox, prefetch=0)
    publish, busy = aio_pika.Exchange.publish, asyncio.Lock()

    async def slowly_confirmed(exchange: aio_pika.Exchange, *args: Any, **kwargs: Any) -> Any:
        confirmation = await publish(exchange, *args, **kwargs)
        async with busy:
            await asyncio.sleep(0.4)
        return confirmation

    monkeypatch.setattr(aio_pika.Exchange, "publish", slowly_confirmed)
    names = [f"s{number}" for number in range(8)]
    await asyncio.gather(*(broker.publish(generate(name), topology.generate(), persistent=True) for name in names))
    assert [await inbox.next() for _ in names] == [generate(name) for name in names]
    assert await inbox.nothing_more()


async def test_a_connection_that_the_client_library_gives_up_is_a_lost_one(amqp_url: str, namespace: str) -> None:
    """aiormq does so after missed heartbeats, also where this process itself stood still."""
    async with link_to(amqp_url) as link:
        drafter, inbox = await Broker.connect(amqp_url, Topology(namespace), "drafter"), Inbox()
        await drafter.consume(drafter.topology.generate_queue(), inbox, prefetch=1)
        broker = await Broker.connect(link.url, Topology(namespace), "gateway")
        link.flowing.clear()
        sending = asyncio.create_task(broker.publish(generate("s"), topology.generate(), persistent=True))
        await asyncio.sleep(0.2)
        assert broker._connection.transport is not None
        broker._connection.transport.connection._reader_task.cancel()
        link.flowing.set()
        await asyncio.wait_for(sending, HANG_S)
        assert (await inbox.next()) == generate("s")
        await broker.close()
        await drafter.close()


async def test_a_transient_message_is_dropped_where_the_connection_just_ends(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiormq raises a bare Exception then."""
    broker = await connect("scheduler")
    monkeypatch.setattr(aio_pika.Exchange, "publish", AsyncMock(side_effect=Exception))
    await broker.publish(generate("s"), topology.generate())
    monkeypatch.setattr(aio_pika.Exchange, "publish", AsyncMock(side_effect=ValueError))
    with pytest.raises(ValueError, match=r"^$"):
        await broker.publish(generate("s"), topology.generate())


async def test_a_question_of_permission_outlives_a_lost_connection(
    amqp_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter asks while it serves already: its sessions must not die with the connection."""
    ask, failed = client.may_publish, asyncio.Event()

    async def asked(*question: Any) -> bool:
        try:
            return await ask(*question)
        except CONNECTION_EXCEPTIONS:
            failed.set()
            raise

    monkeypatch.setattr(client, "may_publish", asked)
    async with link_to(amqp_url) as link:
        broker = await Broker.connect(link.url, Topology(namespace), "drafter")
        await link.cut()
        asking = asyncio.create_task(broker.may_publish("key"))
        await asyncio.wait_for(failed.wait(), HANG_S)
        await link.mend()
        assert await asyncio.wait_for(asking, HANG_S)
        await broker.close()


async def test_a_message_that_cannot_be_sent_is_an_error_in_words(
    amqp_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.broker.client.PERSISTENT_TIMEOUT_S", 0.5)
    async with link_to(amqp_url) as link:
        broker = await Broker.connect(link.url, Topology(namespace), "gateway")
        await link.cut()
        with pytest.raises(BrokersError, match=r"RabbitMQ did not confirm a Generate message: [a-z ]+$"):
            await broker.publish(generate("s"), topology.generate(), persistent=True)
        await broker.close()


@pytest.mark.parametrize("replicated_first", [False, True])
async def test_a_shared_queue_of_another_type_is_used_as_it_is(
    amqp_url: str, namespace: str, replicated_first: bool
) -> None:
    first, second = [
        await Broker.connect(amqp_url, Topology(namespace, replicated=kind), "x")
        for kind in (replicated_first, not replicated_first)
    ]
    active, standby = Inbox(), Inbox()
    await first.consume(first.topology.verify_queue(), active)
    await second.consume(second.topology.verify_queue(), standby)
    await second.publish(verify(), topology.VERIFY)
    assert (await active.next()) == verify()
    await first.close()
    await second.publish(verify("t"), topology.VERIFY)
    assert (await standby.next()) == verify("t")
    await second.close()


async def test_a_shared_queue_without_an_answer_is_reported_as_down(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ 4.3 answers for a queue on a node that does not run after more than a minute."""
    declare = aiormq.Channel.queue_declare
    answers = asyncio.Event()
    given_up = []

    async def declare_own_queues(channel: aiormq.Channel, queue: str = "", **options: Any) -> Any:
        if not options.get("exclusive"):
            try:
                await answers.wait()
            except asyncio.CancelledError:
                given_up.append(queue)
                raise
        return await declare(channel, queue, **options)

    monkeypatch.setattr(aiormq.Channel, "queue_declare", declare_own_queues)
    monkeypatch.setattr(declarations, "ANSWER_S", 0.1)
    monkeypatch.setattr(client, "RETRIED_S", 1.0)
    with capture_logs() as logs:
        broker = await asyncio.wait_for(connect("starting"), client.CONNECT_TIMEOUT_S)
    assert [(log["event"], log["queue"]) for log in logs if log["log_level"] == "warning"] == [
        ("a queue is not declared yet: RabbitMQ does not answer", broker.topology.dead)
    ]
    queue = broker.topology.verify_queue()
    with pytest.raises(BrokersError, match=f"{queue.name}.* on a node that does not run"):
        await asyncio.wait_for(broker.consume(queue, Inbox()), client.CONNECT_TIMEOUT_S)
    with pytest.raises(QueueDown, match=f"{queue.name}.* on a node that does not run"):
        await broker.liveness.check_queue(queue, 0.1)
    await broker.consume(broker.topology.own_queue("test", "own", ()), Inbox())
    assert given_up == [], "the late refusal of a question that was given up ends the connection"
    answers.set()
    await broker.consume(queue, Inbox())
