"""Starts of sessions in a drafter, beside others, against a broker in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import builders
from patience import HANG_S

from services.drafter.drafting import no_drafting
from services.drafter.service import Drafter
from services.drafter.settings import DraftServingSettings
from shared.broker.topology import Topology
from shared.errors import GrammarError
from shared.messages import Cancel, Grammar, Message, Sampling

FOLLOWS = Sampling(grammar=Grammar(text="{}", prompt_len=3))


class RecordingBroker:
    """Keeps what the drafter publishes, and the handler of its requests."""

    topology = Topology("t")

    def __init__(self) -> None:
        self.published: asyncio.Queue[Any] = asyncio.Queue()
        self.requested: Callable[[Message], Awaitable[None]] | None = None

    async def consume(self, queue: object, handler: Callable[[Message], Awaitable[None]], **_options: object) -> None:
        self.requested = handler

    def on_reconnect(self, _callback: Callable[[], None]) -> None:
        pass

    async def publish(self, message: Message, _key: str, **_options: object) -> None:
        await self.published.put(message)


class SlowGrammars:
    """Grammars that take until they are released to build, and then fail."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def session(self, session_id: str, grammar: Grammar) -> None:
        self.released.wait(5)
        raise GrammarError("it cannot be built")

    def forget(self, session_id: str) -> None:
        pass


async def test_a_grammar_that_is_built_holds_up_no_other_session() -> None:
    broker, grammars = RecordingBroker(), SlowGrammars()
    drafting = replace(no_drafting(), grammars=grammars)  # type: ignore[arg-type]
    options = DraftServingSettings(draft_source="none").options
    drafter = Drafter("d1", "default", options, drafting, broker, None, None)  # type: ignore[arg-type]
    await drafter.take_requests()
    assert broker.requested is not None
    serving = [
        asyncio.ensure_future(broker.requested(builders.generate("slow", sampling=FOLLOWS))),
        asyncio.ensure_future(broker.requested(builders.generate("free"))),
    ]
    try:
        assert (await asyncio.wait_for(broker.published.get(), HANG_S)).session == "free"
        assert set(drafter.session_ids) == {"slow", "free"}
        assert broker.published.empty()
        grammars.released.set()
        after = await asyncio.wait_for(broker.published.get(), HANG_S)
        assert after.session == "slow", "its drafts do without the grammar"
    finally:
        grammars.released.set()
        for session in ("slow", "free"):
            await drafter.receive(Cancel(session=session, reason="over"))
        await asyncio.wait_for(asyncio.gather(*serving), HANG_S)


async def test_a_session_cancelled_while_its_grammar_is_built_ends() -> None:
    broker, grammars = RecordingBroker(), SlowGrammars()
    drafting = replace(no_drafting(), grammars=grammars)  # type: ignore[arg-type]
    options = DraftServingSettings(draft_source="none").options
    drafter = Drafter("d1", "default", options, drafting, broker, None, None)  # type: ignore[arg-type]
    await drafter.take_requests()
    assert broker.requested is not None
    serving = asyncio.ensure_future(broker.requested(builders.generate("slow", sampling=FOLLOWS)))
    await asyncio.sleep(0)
    assert drafter.session_ids == ["slow"]
    await drafter.receive(Cancel(session="slow", reason="over"))
    grammars.released.set()
    await asyncio.wait_for(serving, HANG_S)
    assert drafter.session_ids == []
