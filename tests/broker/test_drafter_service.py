"""The drafter as a service, on real brokers; the test plays scheduler and verifier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from drafter_peer import Peer, drafting
from link import link_to

from services.drafter import service
from services.drafter.settings import DrafterSettings
from shared.broker import topology
from shared.messages import Cancel, Finish, Status, Verify


@pytest.fixture
async def peer(amqp_url: str, redis_url: str, namespace: str) -> AsyncIterator[Peer]:
    settings = DrafterSettings(
        amqp_url=amqp_url,
        redis_url=redis_url,
        namespace=namespace,
        draft_source="lookup",
        stop_rule="fixed",
        draft_length=3,
        min_timeout_ms=200,
    )
    async with Peer.connected(settings) as connected:
        yield connected


async def test_a_session_goes_round_by_round_to_its_end(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        assert (first.round, first.base_len, first.draft) == (0, 5, [3, 1, 2]), "copied: the prompt repeats itself"
        assert (first.drafter, first.gateway, first.fingerprint, first.attempt) == ("d1", "g", "f", 0)
        await peer.answer(first, [3, 9])
        second = await peer.round()
        assert (second.round, second.base_len) == (1, 7)
        await peer.answer(second, [4], Finish.STOP)
        assert await peer.silent(0.5), "an ended session needs no further round"


async def test_a_round_without_a_result_is_sent_again(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        for number in range(6):
            await peer.answer(await _first_try(peer, number), [7])
        lost = await _first_try(peer, 6)
        again = await peer.round()
        assert again.attempt == 1
        assert (again.round, again.base_len, again.draft) == (lost.round, lost.base_len, lost.draft)
        await peer.answer(again, [7])
        await peer.answer(lost, [7])
        following = await _first_try(peer, lost.round + 1)
        assert following.base_len == lost.base_len + 1


async def _first_try(peer: Peer, number: int) -> Verify:
    """Return a round; earlier ones may have been sent again, because a busy machine answers late."""
    while (verify := await peer.round()).round != number:
        assert verify.round < number
    return verify


async def test_a_round_is_sent_again_when_the_connection_is_restored(peer: Peer) -> None:
    async with link_to(peer.settings.amqp_url) as link:
        settings = peer.settings.model_copy(update={"amqp_url": link.url, "min_timeout_ms": 60_000})
        async with drafting(settings, "d1"):
            await peer.ask("s")
            lost = await peer.round()
            await link.cut()
            await link.mend()
            again = await peer.round()
            assert (again.session, again.round) == (lost.session, lost.round)


async def test_a_round_is_sent_again_when_a_scheduler_is_back(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SCHEDULERS_SILENT_S", 1.5)
    settings = peer.settings.model_copy(update={"min_timeout_ms": 60_000})
    async with drafting(settings, "d1"):
        await peer.ask("s")
        lost = await peer.round()
        await peer.load()
        assert await peer.silent(0.3), "it has not waited for long"
        await asyncio.sleep(1.5)
        await peer.load()
        again = await peer.round()
        assert (again.session, again.round, again.attempt) == (lost.session, lost.round, 1)
        for _ in range(8):
            await asyncio.sleep(0.2)
            await peer.load()
        assert await peer.silent(0.2), "the scheduler was there all the time"


async def test_another_drafter_continues_from_the_committed_tokens(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        await peer.answer(first, [8, 9])
        second = await peer.round()
        assert second.drafter == "d1"
    async with drafting(peer.settings, "d2"):
        taken = await peer.round()
        assert (taken.drafter, taken.round, taken.base_len) == ("d2", 1, 7)
        assert taken.committed_in == ["wisp-1"]
        await peer.answer(second, [5, 6])
        await peer.answer(taken, [5, 6])
        following = await peer.round()
        assert (following.drafter, following.base_len) == ("d2", 9), "tokens of its predecessor's round are kept"


async def test_a_cancelled_session_ends(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        verify = await peer.round()
        await peer.store.cancel("s")
        await peer.broker.publish(Cancel(session="s", reason="client left"), topology.CANCEL)
        await asyncio.sleep(0.2)
        await peer.send(verify, verify.base_len, Status.COMMITTED, [1])
        assert await peer.silent(0.5)


async def test_a_request_for_an_ended_or_missing_session_is_dropped(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("over")
        first = await peer.round()
        await peer.answer(first, [2], Finish.STOP)
        again = peer.generate("over")
        await peer.publish(again)
        gone = again.model_copy(update={"session": "gone"})
        await peer.publish(gone)
        assert await peer.silent(0.5)
