"""Starts of sessions in a drafter, beside others, against a broker in memory."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import cast

import builders
from broker_contract import Inbox
from memory_broker import MemoryBroker
from patience import HANG_S

from services.drafter.drafting import no_drafting
from services.drafter.service import Drafter
from services.drafter.settings import DraftServingSettings
from shared.broker import topology
from shared.broker.client import Broker
from shared.errors import GrammarError
from shared.messages import Cancel, Generate, Grammar, Message, Sampling, Verify

FOLLOWS = Sampling(grammar=Grammar(text="{}", prompt_len=3))


class SlowGrammars:
    """Grammars that take until they are released to build, and then fail."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def session(self, session_id: str, grammar: Grammar) -> None:
        self.released.wait(5)
        raise GrammarError("it cannot be built")

    def forget(self, session_id: str) -> None:
        pass


async def serving(grammars: SlowGrammars) -> tuple[Drafter, MemoryBroker, Inbox]:
    """A drafter with these grammars that takes requests; its broker, and the rounds that it sends."""
    drafting = replace(no_drafting(), grammars=grammars)  # type: ignore[arg-type]
    options = DraftServingSettings(draft_source="none", min_timeout_ms=60_000).options
    broker, rounds = MemoryBroker(), Inbox()
    drafter = Drafter("d1", "default", options, drafting, cast("Broker", broker), None, None)
    await drafter.take_requests()
    await broker.consume(broker.topology.verify_queue(), rounds)
    return drafter, broker, rounds


async def request(broker: MemoryBroker, *requests: Generate) -> None:
    """Send requests to the drafter."""
    for one in requests:
        await broker.publish(one, topology.generate("default"), persistent=True)


async def test_a_grammar_that_is_built_holds_up_no_other_session() -> None:
    grammars = SlowGrammars()
    drafter, broker, rounds = await serving(grammars)
    await request(broker, builders.generate("slow", sampling=FOLLOWS), builders.generate("free"))
    try:
        assert session_of(await rounds.next()) == "free"
        assert set(drafter.session_ids) == {"slow", "free"}
        assert rounds.messages.empty()
        grammars.released.set()
        assert session_of(await rounds.next()) == "slow", "its drafts do without the grammar"
    finally:
        grammars.released.set()
        for session in ("slow", "free"):
            await drafter.receive(Cancel(session=session, reason="over"))
        await asyncio.wait_for(broker.server.handled(), HANG_S)


async def test_a_session_cancelled_while_its_grammar_is_built_ends() -> None:
    grammars = SlowGrammars()
    drafter, broker, _ = await serving(grammars)
    await request(broker, builders.generate("slow", sampling=FOLLOWS))
    await asyncio.sleep(0)
    assert drafter.session_ids == ["slow"]
    await drafter.receive(Cancel(session="slow", reason="over"))
    grammars.released.set()
    await asyncio.wait_for(broker.server.handled(), HANG_S)
    assert drafter.session_ids == []


def session_of(message: Message) -> str:
    """The session of a round."""
    assert isinstance(message, Verify)
    return message.session
