"""The drafter as a service, on real brokers; the test plays scheduler and verifier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from services.drafter.service import serve
from services.drafter.settings import DrafterSettings
from shared import topology
from shared.broker import Broker
from shared.errors import Unroutable
from shared.messages import Cancel, Finish, Generate, Message, Result, Sampling, Status, Verify
from shared.store import Commit, Request, Store
from shared.topology import Topology

PROMPT = [1, 2, 3, 1, 2]


@dataclass
class Peer:
    """What the test does in place of the other services."""

    broker: Broker
    store: Store
    rounds: asyncio.Queue[Message]
    settings: DrafterSettings

    async def ask(self, session: str, max_tokens: int = 20) -> None:
        request = Request(
            session=session,
            gateway="g",
            prompt_len=len(PROMPT),
            sampling=Sampling(),
            stop_ids=[],
            max_tokens=max_tokens,
            fingerprint="f",
        )
        await self.store.create(request, PROMPT)
        generate = Generate(
            session=session,
            gateway="g",
            prompt=PROMPT,
            sampling=Sampling(),
            stop_ids=[],
            max_tokens=max_tokens,
            fingerprint="f",
            vocab_fingerprint="v",
        )
        await self.publish(generate)

    async def publish(self, generate: Generate) -> None:
        """Hand a request to the pool; the first drafter to start makes its queue."""
        async with asyncio.timeout(10):
            while True:
                try:
                    return await self.broker.publish(generate, topology.generate(), persistent=True)
                except Unroutable:
                    await asyncio.sleep(0.05)

    async def round(self, timeout_s: float = 10) -> Verify:
        message = await asyncio.wait_for(self.rounds.get(), timeout_s)
        assert isinstance(message, Verify)
        return message

    async def silent(self, seconds: float) -> bool:
        await asyncio.sleep(seconds)
        return self.rounds.empty()

    async def answer(self, verify: Verify, tokens: list[int], finish: Finish | None = None) -> None:
        """Commit these tokens for the round, and send the result."""
        commit = Commit(verify.session, verify.round, verify.base_len, 0, tokens, finish, verify.base_len)
        (done,) = await self.store.commit("v", [commit])
        await self.send(verify, done.base_len, Status(done.outcome.value), done.tokens, done.finish)

    async def send(
        self, verify: Verify, base_len: int, status: Status, tokens: list[int], finish: Finish | None = None
    ) -> None:
        """Only send a result."""
        result = Result(
            session=verify.session,
            round=verify.round,
            base_len=base_len,
            status=status,
            verifier="v",
            batch="b",
            tokens=tokens,
            finish=finish,
        )
        await self.broker.publish(result, topology.result(verify.drafter))


@asynccontextmanager
async def drafting(settings: DrafterSettings, name: str) -> AsyncIterator[None]:
    """A drafter of this name; it is gone when the block ends."""
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, name, stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(serving, 10)


@pytest.fixture
async def peer(amqp_url: str, redis_url: str, namespace: str) -> AsyncIterator[Peer]:
    settings = DrafterSettings(
        amqp_url=amqp_url, redis_url=redis_url, namespace=namespace, draft_length=3, min_timeout_ms=200
    )
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    store = Store.connect(redis_url, namespace, 60)
    rounds: asyncio.Queue[Message] = asyncio.Queue()
    await broker.consume(broker.topology.verify_queue(), rounds.put)
    yield Peer(broker, store, rounds, settings)
    await broker.close()
    await store.close()


async def test_a_session_goes_round_by_round_to_its_end(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        assert (first.round, first.base_len, first.draft) == (0, 5, [3, 1, 2]), "the prompt repeats itself"
        assert (first.drafter, first.gateway, first.fingerprint, first.attempt) == ("d1", "g", "f", 0)
        await peer.answer(first, [3, 9])
        second = await peer.round()
        assert (second.round, second.base_len) == (1, 7)
        await peer.answer(second, [4], Finish.STOP)
        assert await peer.silent(0.5), "an ended session needs no further round"


async def test_a_round_without_a_result_is_sent_again(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        for _ in range(6):
            verify = await peer.round()
            await peer.answer(verify, [7])
        lost = await peer.round()
        again = await peer.round()
        assert again.attempt == 1
        assert (again.round, again.base_len, again.draft) == (lost.round, lost.base_len, lost.draft)
        await peer.answer(again, [7])
        await peer.answer(lost, [7])
        following = await peer.round()
        assert (following.round, following.base_len) == (lost.round + 1, lost.base_len + 1)


async def test_another_drafter_goes_on_from_the_committed_tokens(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        await peer.answer(first, [8, 9])
        second = await peer.round()
        assert second.drafter == "d1"
    async with drafting(peer.settings, "d2"):
        taken = await peer.round()
        assert (taken.drafter, taken.round, taken.base_len) == ("d2", 1, 7)
        await peer.answer(second, [5, 6])
        await peer.answer(taken, [5, 6])
        following = await peer.round()
        assert (following.drafter, following.base_len) == ("d2", 9), "what its predecessor's round brought is kept"


async def test_a_cancelled_session_is_left(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        verify = await peer.round()
        await peer.store.cancel("s")
        await peer.broker.publish(Cancel(session="s", reason="client left"), topology.CANCEL)
        await asyncio.sleep(0.2)
        await peer.send(verify, verify.base_len, Status.COMMITTED, [1])
        assert await peer.silent(0.5)


async def test_a_request_whose_session_is_gone_or_over_is_dropped(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("over")
        first = await peer.round()
        await peer.answer(first, [2], Finish.STOP)
        again = Generate(
            session="over",
            gateway="g",
            prompt=PROMPT,
            sampling=Sampling(),
            stop_ids=[],
            max_tokens=5,
            fingerprint="f",
            vocab_fingerprint="v",
        )
        await peer.publish(again)
        gone = again.model_copy(update={"session": "gone"})
        await peer.publish(gone)
        assert await peer.silent(0.5)
