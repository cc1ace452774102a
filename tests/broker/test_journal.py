"""The journal at a real RabbitMQ: recording leaves routing as it is, and every message reads back once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import aio_pika
import builders
import pytest
import recorded
from link import link_to
from patience import HANG_S
from recorded import A

from services.tools.replayer import files, journal
from services.tools.replayer.core.recording import PackedMessage, Recording, RecordingError, RecordingSource
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import JournalLimits, Topology
from shared.errors import BrokersError, Unroutable
from shared.messages import Cancel, Message, encode

LIMITS = JournalLimits(50_000_000, 3600)

Connect = Callable[[str], Awaitable[Broker]]


@pytest.fixture
async def connect(amqp_url: str, namespace: str) -> AsyncIterator[Connect]:
    """Connect with the journal on; delete its queue at the end."""
    brokers: list[Broker] = []

    async def make(name: str) -> Broker:
        brokers.append(await Broker.connect(amqp_url, Topology(namespace), name, LIMITS))
        return brokers[-1]

    yield make
    for broker in brokers:
        await broker.close()
    await journal.delete(amqp_url, namespace)


async def recorded_now(amqp_url: str, namespace: str, count: int) -> Recording:
    """Return the journal as soon as it has this many messages."""
    async with asyncio.timeout(HANG_S):
        while True:
            found = await journal.read(amqp_url, namespace)
            if len(found.packed) >= count:
                return found


async def send(broker: Broker, sent: list[recorded.Sent]) -> list[Message]:
    """Publish as the services do; return the messages."""
    for _, key, message in sent:
        kind = type(message).__name__
        await broker.publish(message, key, persistent=kind == "Generate", confirmed=kind == "Batch")
    return [message for *_, message in sent]


async def test_a_sessions_messages_are_recorded_once_in_order_with_times(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    broker = await connect("all")
    names = broker.topology
    received: list[Message] = []

    async def take(message: Message) -> None:
        received.append(message)

    await broker.consume(names.generate_queue(), take)
    await broker.consume(names.own_queue("verifier", "v1", (topology.batch("v1"),)), take)
    before_us = time.time_ns() // 1000
    sent = [(at, topology.RESULT_SCHEDULER if key == "result.d1" else key, m) for at, key, m in recorded.sent()]
    messages = await send(broker, sent)
    cancel = Cancel(session=A, reason="client left")
    await broker.publish(cancel, topology.CANCEL, persistent=False)
    found = await recorded_now(amqp_url, namespace, len(messages) + 1)
    assert [entry.message for entry in found.entries()] == [*messages, cancel]
    assert [one.key for one in found.packed] == [*(key for _, key, _ in sent), topology.CANCEL]
    times = [one.at_us for one in found.packed]
    assert all(at is not None and before_us <= at <= time.time_ns() // 1000 for at in times)
    assert found.source.namespace == namespace
    assert len(received) == sum(type(message).__name__ in ("Generate", "Batch") for message in messages)


async def test_a_result_with_several_receivers_is_recorded_once(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    broker = await connect("all")
    result = recorded.result(A, 0, 3, "s1-1", [11])
    await broker.publish(result, topology.result("d1"), cc=(topology.result("g1"), topology.RESULT_SCHEDULER))
    await asyncio.sleep(0.3)
    found = await recorded_now(amqp_url, namespace, 1)
    assert [entry.message for entry in found.entries()] == [result]


async def test_a_message_without_a_receiver_stays_unroutable(connect: Connect) -> None:
    broker = await connect("alone")
    with pytest.raises(Unroutable):
        await broker.publish(recorded.batch("s1-1", recorded.job(A, 0, 3, [])), topology.batch("gone"), confirmed=True)
    with pytest.raises(Unroutable):
        await broker.publish(recorded.generate(), topology.generate("empty-pool"), persistent=True)


async def test_nothing_is_recorded_without_the_setting(amqp_url: str, namespace: str) -> None:
    broker = await Broker.connect(amqp_url, Topology(namespace), "quiet")
    await broker.publish(recorded.verify(A, 0, 3, []), topology.VERIFY)
    await broker.close()
    with pytest.raises(RecordingError, match=r"recording is off\. Start the services with WISP_JOURNAL=true"):
        await journal.read(amqp_url, namespace)


@pytest.mark.parametrize(("pause_s", "count"), [(0, 500), (0.1, 10)])
async def test_reading_ends_while_the_suite_goes_on_sending(
    connect: Connect, amqp_url: str, namespace: str, pause_s: float, count: int
) -> None:
    broker = await connect("busy")
    sent = 0

    async def keep_sending() -> None:
        nonlocal sent
        while True:
            await broker.publish(builders.load(float(sent)), topology.LOAD)
            sent += 1
            await asyncio.sleep(pause_s)

    sending = asyncio.create_task(keep_sending())
    try:
        await recorded_now(amqp_url, namespace, count)
        async with asyncio.timeout(HANG_S):
            found = await journal.read(amqp_url, namespace)
    finally:
        sending.cancel()
    prices = [entry.message.price_ms for entry in found.entries() if hasattr(entry.message, "price_ms")]
    assert prices == [float(i) for i in range(len(prices))]
    assert count <= len(prices) <= sent


async def test_reading_from_a_time_on_leaves_out_earlier_messages(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    broker = await connect("all")
    await broker.publish(builders.load(1.0), topology.LOAD)
    await recorded_now(amqp_url, namespace, 1)
    await asyncio.sleep(0.05)
    since_ms = time.time() * 1000
    await broker.publish(builders.load(2.0), topology.LOAD)
    await recorded_now(amqp_url, namespace, 2)
    found = await journal.read(amqp_url, namespace, since_ms)
    assert [entry.message for entry in found.entries()] == [builders.load(2.0)]
    later = await journal.read(amqp_url, namespace, since_ms + 3_600_000)
    assert later.packed == []


async def test_a_full_journal_drops_its_oldest_part(
    amqp_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small portions: messages that arrive together may share a file, and the broker never drops the last file.
    monkeypatch.setattr(journal, "PUBLISH_AT_ONCE", 10)
    limits = JournalLimits(3_000_000, 3600)
    load = encode(builders.load(1.0))
    big = [PackedMessage(number, "load", load + b"\0" * 20_000) for number in range(500)]  # 10 MB in all
    await journal.fill(amqp_url, namespace, Recording(RecordingSource(namespace), big), limits)
    try:
        async with asyncio.timeout(HANG_S):
            kept = list(range(500))
            while len(kept) > 250:
                kept = [one.at_us or 0 for one in (await journal.read(amqp_url, namespace)).packed]
        assert kept
        assert kept == list(range(kept[0], 500)), "the last ones, without a gap"
    finally:
        await journal.delete(amqp_url, namespace)


async def test_the_limits_are_arguments_of_the_queue(namespace: str) -> None:
    arguments = Topology(namespace).journal_queue(JournalLimits(2_000_000_000, 7200)).arguments
    assert arguments["x-max-length-bytes"] == 2_000_000_000
    assert arguments["x-max-age"] == "7200s"


async def test_other_limits_do_not_change_an_existing_journal(connect: Connect, amqp_url: str, namespace: str) -> None:
    await connect("first")
    other = await Broker.connect(amqp_url, Topology(namespace), "second", JournalLimits(90_000_000, 60))
    await other.publish(builders.load(3.0), topology.LOAD)
    found = await recorded_now(amqp_url, namespace, 1)
    await other.close()
    assert [entry.message for entry in found.entries()] == [builders.load(3.0)]


async def test_services_go_on_when_the_journal_is_deleted(connect: Connect, amqp_url: str, namespace: str) -> None:
    broker = await connect("all")
    assert await journal.delete(amqp_url, namespace)
    assert not await journal.delete(amqp_url, namespace)
    received = asyncio.Event()

    async def take(_: Message) -> None:
        received.set()

    await broker.consume(broker.topology.generate_queue(), take)
    await broker.publish(recorded.generate(), topology.generate(), persistent=True)
    await asyncio.wait_for(received.wait(), HANG_S)


async def test_a_file_is_imported_as_a_journal(amqp_url: str, namespace: str, tmp_path: Path) -> None:
    many = [
        (float(number), "verify", recorded.verify(f"s{number}", 0, 3, [number]))
        for number in range(2 * journal.PREFETCH + 7)
    ]
    recording = recorded.recording(many)
    for number, redacted in enumerate((False, True)):
        path = tmp_path / f"{number}.jsonl.gz"
        files.write(path, recording, without_text=redacted)
        name = f"{namespace}-{number}"
        await journal.fill(amqp_url, name, files.read(path), LIMITS)
        try:
            found = await recorded_now(amqp_url, name, len(many))
            assert [(one.at_us, one.key) for one in found.packed] == [(one.at_us, one.key) for one in recording.packed]
            assert found.redacted == redacted
            assert (found.packed[9].body == recording.packed[9].body) == (not redacted)
            with pytest.raises(RecordingError, match="has a journal already: import into another one"):
                await journal.fill(amqp_url, name, recording, LIMITS)
        finally:
            await journal.delete(amqp_url, name)


async def test_an_empty_journal_reads_as_empty(connect: Connect, amqp_url: str, namespace: str) -> None:
    await connect("silent")
    assert (await journal.read(amqp_url, namespace)).packed == []


async def test_an_unreachable_broker_is_named_without_its_password() -> None:
    with pytest.raises(BrokersError, match=r"cannot be used at amqp://\S*127.0.0.1:1\b.*give its address") as caught:
        await journal.read("amqp://user:hunter2@127.0.0.1:1/", "x")
    assert "hunter2" not in str(caught.value)


async def test_unknown_messages_in_the_journal_are_counted_apart(
    connect: Connect, amqp_url: str, namespace: str
) -> None:
    broker = await connect("all")
    async with await aio_pika.connect(amqp_url) as connection:
        exchange = await (await connection.channel()).get_exchange(namespace)
        await exchange.publish(aio_pika.Message(b"garbage"), topology.LOAD)
    await broker.publish(builders.load(1.0), topology.LOAD)
    found = await recorded_now(amqp_url, namespace, 2)
    assert [entry.message for entry in found.entries()] == [builders.load(1.0)]
    assert sum(found.skipped.values()) == 1


async def test_a_reconnected_service_creates_a_missing_journal_again(amqp_url: str, namespace: str) -> None:
    async with link_to(amqp_url) as link:
        broker = await Broker.connect(link.url, Topology(namespace), "linked", LIMITS)
        await link.cut()
        await journal.delete(amqp_url, namespace)
        await link.mend()
        try:
            async with asyncio.timeout(HANG_S):
                while True:
                    await broker.publish(builders.load(4.0), topology.LOAD)
                    with suppress(RecordingError):
                        if (found := await journal.read(amqp_url, namespace)).packed:
                            break
                    await asyncio.sleep(0.1)
        finally:
            await broker.close()
            await journal.delete(amqp_url, namespace)
    assert next(found.entries()).message == builders.load(4.0)
