"""Gateway, scheduler and verifier for tests of the drafter on real brokers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import builders
import numpy as np
from patience import HANG_S

from services.drafter.service import serve
from services.drafter.settings import DrafterSettings
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.engine.blocks import agreement
from shared.errors import Unroutable
from shared.messages import (
    Finish,
    Generate,
    HiddenFormat,
    HiddenStates,
    Message,
    Status,
    Verify,
)
from shared.models import hidden_states as hidden
from shared.models.hidden_states import Bits
from shared.state.commits import Commit
from shared.state.store import Store

PROMPT = [1, 2, 3, 1, 2]


def made_up_states(count: int, size: int = 64) -> Bits:
    """Return random hidden states of positions 0 to `count`, the same for every session."""
    values = np.random.default_rng(3).standard_normal((500, size), np.float32)[:count]
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@dataclass
class Peer:
    """Acts for the services that a drafter talks to."""

    broker: Broker
    store: Store
    settings: DrafterSettings
    vocabulary: str = "v"
    rounds: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)

    @classmethod
    @asynccontextmanager
    async def connected(cls, settings: DrafterSettings) -> AsyncIterator[Peer]:
        """Connect a peer of drafters with these settings; it receives their rounds."""
        broker = await Broker.connect(settings.amqp_url, Topology(settings.namespace), "peer")
        store = Store.connect(settings.redis_url, settings.namespace, 60)
        peer = cls(broker, store, settings)
        await broker.consume(broker.topology.verify_queue(), peer.rounds.put)
        yield peer
        await broker.close()
        await store.close()

    async def ask(
        self, session: str, max_tokens: int = 40, draft: str = "auto", prompt: Sequence[int] = PROMPT
    ) -> None:
        """Start a session as a gateway does."""
        request = builders.stored_request(session, prompt_len=len(prompt), stop_ids=[], max_tokens=max_tokens)
        await self.store.create(request, list(prompt))
        await self.publish(self.generate(session, max_tokens, draft, prompt))

    def generate(
        self, session: str, max_tokens: int = 40, draft: str = "auto", prompt: Sequence[int] = PROMPT
    ) -> Generate:
        """Return the message that starts a session."""
        return builders.generate(
            session,
            prompt=list(prompt),
            stop_ids=[],
            max_tokens=max_tokens,
            vocab_fingerprint=self.vocabulary,
            draft=draft,
        )

    async def publish(self, generate: Generate) -> None:
        """Publish a request to the pool, as soon as a drafter has declared the pool's queue."""
        async with asyncio.timeout(HANG_S):
            while True:
                try:
                    return await self.broker.publish(generate, topology.generate(), persistent=True)
                except Unroutable:
                    await asyncio.sleep(0.05)

    async def round(self, timeout_s: float = HANG_S) -> Verify:
        """Return the next round that a drafter sends."""
        message = await asyncio.wait_for(self.rounds.get(), timeout_s)
        assert isinstance(message, Verify)
        return message

    async def silent(self, seconds: float) -> bool:
        """Return whether no round arrives within `seconds`."""
        await asyncio.sleep(seconds)
        return self.rounds.empty()

    async def load(self, price_ms: float = 0.0, draft_cap: int = 64) -> None:
        """Publish the scheduler's price and draft cap."""
        await self.broker.publish(builders.load(price_ms, queue_ms=0.0, draft_cap=draft_cap), topology.LOAD)

    async def send_states(self, verify: Verify, tokens: Sequence[int], size: int = 64) -> None:
        """Send the hidden states that the round requested, given the tokens that it will commit."""
        assert verify.hidden_from is not None
        count = verify.base_len + agreement(verify.draft, tokens)
        bits = made_up_states(count, size)[verify.hidden_from :]
        for part in hidden.parts(bits, verify.hidden_from, verify.hidden_format):
            await self.send_part(verify, part)

    async def send_part(self, verify: Verify, part: hidden.Part) -> None:
        """Send these hidden states as those of the round."""
        message = HiddenStates(
            session=verify.session,
            round=verify.round,
            start=part.start,
            count=part.count,
            size=part.size,
            format=HiddenFormat(part.format),
            rows=part.rows,
            scales=part.scales,
        )
        await self.broker.publish(message, topology.result(verify.drafter))

    async def answer(
        self, verify: Verify, tokens: Sequence[int], finish: Finish | None = None, *, states: bool = False
    ) -> None:
        """Commit tokens for the round and send the result. states: send the hidden states before it."""
        if states:
            await self.send_states(verify, tokens)
        accepted = agreement(verify.draft, tokens)
        commit = Commit(verify.session, verify.round, verify.base_len, accepted, tokens, finish, verify.base_len)
        (done,) = await self.store.commit("v", [commit], arithmetic="wisp-1")
        await self.send(verify, done.base_len, Status(done.outcome.value), done.tokens, done.finish)

    async def send(
        self, verify: Verify, base_len: int, status: Status, tokens: list[int], finish: Finish | None = None
    ) -> None:
        """Send a result without committing it."""
        result = builders.result(
            verify.session,
            verify.round,
            base_len,
            tokens,
            status=status,
            accepted=agreement(verify.draft, tokens),
            drafted=len(verify.draft),
            trimmed_to=len(verify.draft),
            verify_ms=50.0,
            finish=finish,
        )
        await self.broker.publish(result, topology.result(verify.drafter))


@asynccontextmanager
async def drafting(settings: DrafterSettings, name: str) -> AsyncIterator[None]:
    """Run a drafter of this name until the block ends."""
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, name, stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(serving, HANG_S)
