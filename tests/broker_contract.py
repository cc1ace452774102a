"""The contract of the broker: the same cases for RabbitMQ and for the one in memory.

A test module subclasses `BrokerContract` and provides the fixture `connect`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import builders
import pytest
from builders import generate, result, verify
from gateway_peer import eventually
from patience import HANG_S

from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.incoming import GiveBack
from shared.errors import Unroutable
from shared.messages import Message, Result

Connect = Callable[[str], Awaitable[Broker]]
"""Opens another connection to the same broker."""


class Inbox:
    """A handler that collects its messages."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()

    async def __call__(self, message: Message) -> None:
        await self.messages.put(message)

    async def next(self) -> Message:
        return await asyncio.wait_for(self.messages.get(), HANG_S)

    async def nothing_more(self) -> bool:
        await asyncio.sleep(0.2)
        return self.messages.empty()


class BrokerContract:
    """Cases for every broker."""

    async def test_one_publish_reaches_drafter_gateway_and_scheduler_once_each(self, connect: Connect) -> None:
        broker = await connect("all")
        names = broker.topology
        inboxes = {key: Inbox() for key in ("result.d", "result.g", topology.RESULT_SCHEDULER)}
        for key, inbox in inboxes.items():
            await broker.consume(names.own_queue("test", key, (key, "result.all")), inbox)
        await broker.publish(result(), "result.d", cc=("result.g", topology.RESULT_SCHEDULER, "result.all"))
        for inbox in inboxes.values():
            assert await inbox.next() == result()
            assert await inbox.nothing_more()

    async def test_an_asterisk_in_a_binding_stands_for_one_word(self, connect: Connect) -> None:
        broker, inbox = await connect("observer"), Inbox()
        await broker.consume(broker.topology.own_queue("test", "x", (topology.drafter("*"),)), inbox)
        heartbeats = [builders.drafter_heartbeat(name) for name in ("d", "e.f", "g")]
        await broker.publish(heartbeats[0], topology.drafter("d"))
        await broker.publish(heartbeats[1], "drafter.e.f")
        await broker.publish(heartbeats[2], topology.drafter("g"))
        assert [await inbox.next(), await inbox.next()] == [heartbeats[0], heartbeats[2]]

    async def test_a_result_of_a_group_whose_handler_fails_does_not_keep_the_others(self, connect: Connect) -> None:
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

    async def test_a_handler_that_waits_holds_up_no_other_message(self, connect: Connect) -> None:
        broker, released = await connect("d1"), asyncio.Event()
        handled: list[str] = []

        async def handle(message: Message) -> None:
            assert isinstance(message, Result)
            if message.session == "slow":
                await released.wait()
            handled.append(message.session)

        await broker.consume(broker.topology.own_queue("drafter", "d1", (topology.result("d1"),)), handle)
        for session in ("slow", "fast"):
            await broker.publish(result(session), topology.result("d1"))
        await eventually(lambda: handled == ["fast"])
        released.set()
        await eventually(lambda: handled == ["fast", "slow"])

    async def test_messages_wait_for_a_consumer_and_keep_their_order(self, connect: Connect) -> None:
        broker, before, after = await connect("drafter"), Inbox(), Inbox()
        requests = [generate(f"s{i}") for i in range(3)]
        end = await broker.consume(broker.topology.generate_queue(), before, prefetch=4)
        await end()
        for request in requests:
            await broker.publish(request, topology.generate(), persistent=True)
        await broker.consume(broker.topology.generate_queue(), after, prefetch=1)
        assert [await after.next() for _ in requests] == requests
        assert before.messages.empty(), "its consumer has ended"

    async def test_prefetch_bounds_the_requests_of_a_drafter(self, connect: Connect) -> None:
        broker, sender = await connect("drafter"), await connect("sender")
        running = 0

        async def hold(message: Message) -> None:
            nonlocal running
            running += 1
            await asyncio.Event().wait()

        await broker.consume(broker.topology.generate_queue(), hold, prefetch=3)
        for i in range(6):
            await sender.publish(generate(f"s{i}"), topology.generate(), persistent=True)
        await eventually(lambda: running == 3)
        await asyncio.sleep(0.3)
        assert running == 3

    async def test_each_request_goes_to_one_of_a_pools_drafters(self, connect: Connect) -> None:
        first, second, sender = await connect("first"), await connect("second"), await connect("sender")
        inboxes = Inbox(), Inbox()
        for drafter, inbox in zip((first, second), inboxes, strict=True):
            await drafter.consume(drafter.topology.generate_queue(), inbox, prefetch=1)
        for i in range(10):
            await sender.publish(generate(f"s{i}"), topology.generate(), persistent=True)
        await eventually(lambda: sum(inbox.messages.qsize() for inbox in inboxes) == 10)
        taken = [inbox.messages.get_nowait() for inbox in inboxes for _ in range(inbox.messages.qsize())]
        assert sorted(taken, key=str) == sorted((generate(f"s{i}") for i in range(10)), key=str)

    async def test_one_scheduler_gets_all_rounds_until_it_leaves(self, connect: Connect) -> None:
        first, second, sender = await connect("first"), await connect("second"), await connect("sender")
        active, standby = Inbox(), Inbox()
        end = await first.consume(first.topology.verify_queue(), active)
        await second.consume(second.topology.verify_queue(), standby)
        for i in range(10):
            await sender.publish(verify(f"a{i}"), topology.VERIFY)
        assert [await active.next() for _ in range(10)] == [verify(f"a{i}") for i in range(10)]
        await end()
        await sender.publish(verify("b"), topology.VERIFY)
        assert await standby.next() == verify("b"), "and none before"

    async def test_a_request_that_is_given_back_is_delivered_again(self, connect: Connect) -> None:
        broker, sender, inbox = await connect("drafter"), await connect("sender"), Inbox()

        async def once(message: Message) -> None:
            await inbox(message)
            if inbox.messages.qsize() == 1:
                raise GiveBack

        await broker.consume(broker.topology.generate_queue(), once, prefetch=4)
        await sender.publish(generate(), topology.generate(), persistent=True)
        await eventually(lambda: inbox.messages.qsize() == 2)
        assert [await inbox.next(), await inbox.next()] == [generate()] * 2

    async def test_a_persistent_message_that_no_queue_takes_is_an_error(self, connect: Connect) -> None:
        broker = await connect("sender")
        with pytest.raises(Unroutable, match=r"generate\.nowhere"):
            await broker.publish(generate(), topology.generate("nowhere"), persistent=True)

    async def test_a_confirmed_batch_that_no_verifier_takes_is_an_error(self, connect: Connect) -> None:
        broker = await connect("scheduler")
        batch = builders.batch()
        with pytest.raises(Unroutable, match=r"batch\.nobody"):
            await broker.publish(batch, topology.batch("nobody"), confirmed=True)

    async def test_a_transient_message_that_no_queue_takes_is_dropped(self, connect: Connect) -> None:
        broker, inbox = await connect("verifier"), Inbox()
        await broker.consume(broker.topology.own_queue("drafter", "d", (topology.result("d"),)), inbox)
        await broker.publish(result("lost"), topology.result("nobody"))
        await broker.publish(result("copied"), topology.result("nobody"), cc=("result.none", topology.result("d")))
        await broker.publish(result("next"), topology.result("d"))
        assert [await inbox.next(), await inbox.next()] == [result("copied"), result("next")]
        assert await inbox.nothing_more()
