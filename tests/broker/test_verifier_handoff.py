"""KV that one verifier hands over to another through a real Redis. The test plays scheduler and drafter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import builders
import pytest
from gateway_peer import eventually
from patience import HANG_S
from redis.asyncio import Redis

from services.tools.bench.support.tiny import tiny_model
from services.verifier import service
from services.verifier.service import serve
from services.verifier.settings import VerifierSettings
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.engine import Engine, Step
from shared.kernels.layout import BLOCK
from shared.messages import Heartbeat, Message, Result, RunGrant, Sampling, Status
from shared.models.folder import ModelFolder
from shared.sampling.sampler import choose
from shared.state.store import Store

PROMPT = [3 + (5 * place) % 200 for place in range(4 * BLOCK + 10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(model: Path) -> list[int]:
    """The model's continuation of the prompt."""
    engine = Engine(model, budget_tokens=1024)
    tokens = list(PROMPT)
    engine.attach("s", tokens)
    for _ in range(2 * BLOCK):
        logits = engine.forward([Step("s", tokens[engine.cached("s") :])]).logits
        tokens += choose(logits, [Sampling()], [len(tokens)])
    return tokens[len(PROMPT) :]


@dataclass
class Peer:
    """Sends rounds and takes results."""

    broker: Broker
    store: Store
    settings: VerifierSettings
    arithmetics: dict[str, str] = field(default_factory=dict)
    """Of the verifiers that have sent a heartbeat."""
    leases: dict[str, int] = field(default_factory=dict)
    results: asyncio.Queue[Result] = field(default_factory=asyncio.Queue)
    rounds: int = 0

    async def receive(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.arithmetics[message.verifier] = message.arithmetic
            self.leases[message.verifier] = message.lease
        elif isinstance(message, Result):
            self.results.put_nowait(message)

    @asynccontextmanager
    async def verifier(self, name: str, **fields: Any) -> AsyncIterator[None]:
        """Run a verifier, which drains at the end."""
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(self.settings.model_copy(update=fields), name, stop))
        try:
            await eventually(lambda: name in self.arithmetics)
            yield
        finally:
            stop.set()
            await asyncio.wait_for(serving, HANG_S)

    async def verify(self, verifier: str, length: int, draft: list[int], run: RunGrant | None = None) -> Result:
        """Send the session's next round and return its result. run: what the verifier may decode after it."""
        fingerprint = ModelFolder(self.settings.target).fingerprint("bfloat16")
        job = builders.job("s", self.rounds, length, draft, fingerprint=fingerprint, run=run)
        self.rounds += 1
        batch = builders.batch(f"b{self.rounds}", job, lease=0 if run is None else self.leases[verifier])
        await self.broker.publish(batch, topology.batch(verifier), confirmed=True)
        return await asyncio.wait_for(self.results.get(), HANG_S)


@pytest.fixture
async def peer(amqp_url: str, redis_url: str, namespace: str, model: Path) -> AsyncIterator[Peer]:
    settings = VerifierSettings(
        amqp_url=amqp_url,
        redis_url=redis_url,
        namespace=namespace,
        target=model,
        profile=False,
        cache_tokens=1024,
        kv_handoff="drain",
    )
    broker = await Broker.connect(amqp_url, Topology(namespace), "peer")
    store = Store.connect(redis_url, namespace, 60)
    one = Peer(broker, store, settings)
    keys = (topology.heartbeat("*"), topology.result("d"))
    await broker.consume(broker.topology.own_queue("test", "x", keys), one.receive)
    request = builders.stored_request(
        prompt_len=len(PROMPT), stop_ids=[], max_tokens=500, fingerprint=ModelFolder(model).fingerprint("bfloat16")
    )
    await store.create(request, PROMPT)
    yield one
    await broker.close()
    await store.close()


async def test_after_a_drain_the_next_verifier_computes_less_than_a_block(peer: Peer, text: list[int]) -> None:
    async with peer.verifier("v1"):
        first = await peer.verify("v1", len(PROMPT), text[:3])
        assert first.new_tokens == len(PROMPT) + 3
    async with peer.verifier("v2"):
        second = await peer.verify("v2", len(PROMPT) + 4, text[4:7])
        assert first.tokens + second.tokens == text[:8]
        assert second.new_tokens < BLOCK


async def test_a_drain_in_the_middle_of_a_run_hands_it_over(peer: Peer, text: list[int]) -> None:
    step_ms = 20.0
    async with peer.verifier("v1", emulated_cost=[step_ms, 0, 0, 0, 0, 0, 0]):
        await eventually(lambda: bool(peer.leases["v1"]))
        first = await peer.verify("v1", len(PROMPT), [], RunGrant(tokens=400, ms=HANG_S * 1000))
        assert first.run_left > 0
        results = [first, await asyncio.wait_for(peer.results.get(), HANG_S)]
    while results[-1].run_left:
        results.append(await asyncio.wait_for(peer.results.get(), HANG_S))
    made = [token for result in results for token in result.tokens]
    assert results[-1].finish is None
    assert len(made) < 300, "long before the end of its grant"
    assert made[: len(text)] == text[: len(made)]
    (stored,) = await peer.store.read(["s"])
    assert stored is not None
    assert stored.tokens == PROMPT + made
    peer.rounds = results[-1].round + 1
    async with peer.verifier("v2"):
        following = await peer.verify("v2", len(PROMPT) + len(made), [])
        assert (following.status, following.base_len) == (Status.COMMITTED, len(PROMPT) + len(made))
        assert following.new_tokens < len(PROMPT), "the prompt's KV was handed over"


async def test_without_handoff_the_whole_session_is_computed_again(peer: Peer, text: list[int]) -> None:
    async with peer.verifier("v1", kv_handoff="off"):
        await peer.verify("v1", len(PROMPT), text[:3])
    async with peer.verifier("v2"):
        second = await peer.verify("v2", len(PROMPT) + 4, text[4:7])
        assert second.tokens == text[4:8]
        assert second.new_tokens == len(PROMPT) + 4 + 3


async def test_kv_of_another_arithmetic_is_not_adopted(
    peer: Peer, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with peer.verifier("v1"):
        first = await peer.verify("v1", len(PROMPT), text[:3])
    load = service._load_engine

    def load_another(settings: VerifierSettings) -> Engine:
        engine = load(settings)
        engine.arithmetic = "another"
        return engine

    monkeypatch.setattr(service, "_load_engine", load_another)
    async with peer.verifier("v2"):
        second = await peer.verify("v2", len(PROMPT) + 4, text[4:7])
    assert second.new_tokens == len(PROMPT) + 4 + 3
    assert (second.arithmetic, second.committed_in) == ("another", [first.arithmetic, "another"])
    assert peer.arithmetics == {"v1": first.arithmetic, "v2": "another"}


async def test_write_through_hands_kv_over_while_its_verifier_lives(
    peer: Peer, text: list[int], redis_url: str, namespace: str
) -> None:
    async def kept() -> int:
        async with Redis.from_url(redis_url) as redis:
            return len([key async for key in redis.scan_iter(f"{namespace}:kv:*")])

    async def until(blocks: int) -> None:
        async with asyncio.timeout(HANG_S):
            while await kept() < blocks:  # noqa: ASYNC110 - Redis has no event for it
                await asyncio.sleep(0.02)

    async with peer.verifier("v1", kv_handoff="write-through"), peer.verifier("v2", kv_handoff="write-through"):
        length = len(PROMPT)
        while length < len(PROMPT) + BLOCK:
            done = length - len(PROMPT)
            result = await peer.verify("v1", length, text[done : done + 7])
            length += len(result.tokens)
        await until(5)
        done = length - len(PROMPT)
        result = await peer.verify("v2", length, text[done : done + 2])
        assert result.tokens == text[done : done + 3]
        assert result.new_tokens < BLOCK
    async with Redis.from_url(redis_url) as redis:
        async for key in redis.scan_iter(f"{namespace}:kv*:*"):
            assert key.startswith(f"{namespace}:kvs".encode()) or 0 < await redis.pttl(key) <= 120_000


async def test_a_damaged_block_is_ignored_and_the_completion_is_right(
    peer: Peer, text: list[int], redis_url: str, namespace: str
) -> None:
    async with peer.verifier("v1"):
        await peer.verify("v1", len(PROMPT), text[:3])
    async with Redis.from_url(redis_url) as redis:
        names = sorted([key async for key in redis.scan_iter(f"{namespace}:kv:*")])
        assert len(names) == 4
        for name in names:
            await redis.set(name, b"half a block")
    async with peer.verifier("v2"):
        second = await peer.verify("v2", len(PROMPT) + 4, text[4:7])
        assert second.tokens == text[4:8]
        assert second.new_tokens == len(PROMPT) + 4 + 3


async def test_blocks_in_redis_are_limited_and_expire(peer: Peer) -> None:
    kind, blocks = "1-model-layout", {bytes([number]) * 16: b"content" for number in range(5)}
    assert await peer.store.kv.keep(kind, blocks, ttl_s=1, most=3) == 3
    assert await peer.store.kv.keep(kind, blocks, ttl_s=1, most=3) == 0
    assert await peer.store.kv.touch(kind, list(blocks), ttl_s=1) == [True] * 3 + [False] * 2
    assert await peer.store.kv.read(kind, list(blocks)) == [b"content"] * 3 + [None] * 2
    await asyncio.sleep(1.1)
    assert await peer.store.kv.touch(kind, list(blocks), ttl_s=1) == [False] * 5
    assert await peer.store.kv.keep(kind, blocks, ttl_s=60, most=3) == 3, "expired blocks do not count"
