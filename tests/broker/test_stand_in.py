"""A scheduler's stand-in for drafters, on real brokers; the test plays scheduler and verifier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import builders
import pytest
from drafter_peer import Peer, drafting
from gateway_peer import eventually

from services.drafter.settings import DrafterSettings
from services.scheduler import metrics
from services.scheduler.stand_in import StandIn
from shared.broker import topology
from shared.broker.client import Broker
from shared.messages import DrafterHeartbeat, Finish
from shared.state.store import Store


@pytest.fixture
async def peer(amqp_url: str, redis_url: str, namespace: str) -> AsyncIterator[Peer]:
    settings = DrafterSettings(
        amqp_url=amqp_url,
        redis_url=redis_url,
        namespace=namespace,
        draft_source="lookup",
        stop_rule="fixed",
        draft_length=3,
        min_timeout_ms=60_000,
        max_sessions=1,
    )
    async with Peer.connected(settings) as connected:
        yield connected


@asynccontextmanager
async def standing_in(peer: Peer, scheduler: str = "s1", most: int = 8) -> AsyncIterator[StandIn]:
    """Run the stand-in of a scheduler of this name until the block ends."""
    async with AsyncExitStack() as resources:
        broker = await Broker.connect(peer.settings.amqp_url, peer.broker.topology, scheduler)
        resources.push_async_callback(broker.close)
        store = Store.connect(peer.settings.redis_url, peer.settings.namespace)
        resources.push_async_callback(store.close)
        stand_in = StandIn(scheduler, ["pool"], most, broker, store)
        # In service they come by the scheduler, which has a queue for them.
        names = peer.broker.topology
        messages = names.own_queue("test", scheduler, (topology.result(f"{scheduler}.pool"), topology.CANCEL))
        await broker.consume(messages, stand_in.receive)
        tasks = [asyncio.create_task(loop) for loop in await stand_in.join()]
        try:
            yield stand_in
        finally:
            for task in tasks:
                task.cancel()


async def sent_by(peer: Peer, drafter: str, session: str) -> None:
    """Wait until this drafter sends a round of this session; other rounds may be sent again meanwhile."""
    while True:
        sent = await peer.round()
        if (sent.drafter, sent.session) == (drafter, session):
            return


async def test_a_request_without_a_drafter_is_decoded_in_runs(peer: Peer) -> None:
    async with standing_in(peer) as stand_in:
        await peer.broker.publish(builders.load(run_ms=5.0), topology.LOAD)
        await peer.ask("s", draft="lookup")
        first = await peer.round()
        assert (first.drafter, first.round, first.base_len, first.draft) == ("s1.pool", 0, 5, [])
        assert first.run_tokens >= 64
        await eventually(lambda: stand_in.without_drafters() == ["pool"])
        assert stand_in.notes() == {"default pool": "no drafter; sessions decoded without drafts: 1"}
        await peer.answer(first, [3, 9], Finish.STOP)
        ended = {"default pool": "no drafter; sessions decoded without drafts: 0"}
        await eventually(lambda: stand_in.notes() == ended)
        assert await peer.silent(0.3)


async def test_sessions_move_to_a_drafter_that_joins(peer: Peer) -> None:
    async with standing_in(peer) as stand_in:
        await peer.ask("s")
        first = await peer.round()
        await peer.answer(first, [3, 9])
        second = await peer.round()
        assert second.drafter == "s1.pool"
        async with drafting(peer.settings, "d1"):
            taken = await peer.round()
            assert (taken.session, taken.drafter) == ("s", "d1")
            assert (taken.round, taken.base_len) == (second.round, second.base_len)
            assert stand_in.without_drafters() == []
            await peer.answer(second, [8])
            await peer.answer(taken, [8])
            following = await peer.round()
            assert (following.drafter, following.base_len) == ("d1", 8)
            await peer.ask("new")
            await sent_by(peer, "s1.pool", "new")
            await asyncio.sleep(1.5)  # more than the time between two heartbeats
            rounds = [await peer.round() for _ in range(peer.rounds.qsize())]
            assert {sent.drafter for sent in rounds if sent.session == "new"} <= {"s1.pool"}, "d1 has no room"
            await peer.answer(following, [4], Finish.STOP)
            await sent_by(peer, "d1", "new")
        await sent_by(peer, "s1.pool", "new")


async def test_the_sessions_of_a_stand_in_are_counted(peer: Peer) -> None:
    seen: asyncio.Queue[DrafterHeartbeat] = asyncio.Queue()
    own = peer.broker.topology.own_queue("test", "observer", (topology.drafter("*"),))
    await peer.broker.consume(own, seen.put)  # type: ignore[arg-type]
    async with standing_in(peer):
        await peer.ask("s")
        await peer.round()
        counted = metrics.STAND_IN_SESSIONS.labels("pool")
        await eventually(lambda: counted._value.get() == 1)
        beat = await asyncio.wait_for(seen.get(), 60.0)
        assert (beat.drafter, beat.pool, beat.drafts) == ("s1.pool", "pool", False)


async def test_a_stand_in_holds_a_limited_number_of_sessions(peer: Peer) -> None:
    async with standing_in(peer, most=2):
        for name in ("a", "b", "c"):
            await peer.ask(name)
        first, second = await peer.round(), await peer.round()
        assert {first.session, second.session} == {"a", "b"}
        assert await peer.silent(0.3)
        await peer.answer(first, [4], Finish.STOP)
        assert (await peer.round()).session == "c"


async def test_another_scheduler_goes_on_when_one_dies(peer: Peer) -> None:
    async with standing_in(peer, "s1"):
        await peer.ask("s")
        first = await peer.round()
        await peer.answer(first, [8, 9])
        assert (await peer.round()).drafter == "s1.pool"
        resources = AsyncExitStack()
        await resources.enter_async_context(standing_in(peer, "s2"))
    async with resources:
        taken = await peer.round()
        assert (taken.drafter, taken.round, taken.base_len) == ("s2.pool", 1, 7)


async def test_a_session_given_to_a_drafter_that_has_died_comes_back(peer: Peer) -> None:
    async with standing_in(peer):
        await peer.ask("s")
        first = await peer.round()
        await peer.answer(first, [4])
        second = await peer.round()
        # A drafter that has died since.
        await peer.broker.publish(builders.drafter_heartbeat("d9"), topology.drafter("d9"))
        again = await peer.round()
        assert (again.drafter, again.round, again.base_len) == ("s1.pool", second.round, second.base_len)
        await peer.answer(again, [6], Finish.STOP)
        assert await peer.silent(0.3)
