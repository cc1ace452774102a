"""A drafter whose draft learns: it learns between sessions, from the states that came with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import builders
import numpy as np
from broker_contract import Inbox
from memory_broker import MemoryBroker

from services.drafter.control import Controller
from services.drafter.core.observed import ObservedSession, StateRecorder
from services.drafter.drafting import Drafting
from services.drafter.hidden.card import SHIPPED, HiddenDraftFolder
from services.drafter.learning.process import LearningUse
from services.drafter.learning.reports import DraftWeights, LearningOptions, LearningOutcome, LearningReport
from services.drafter.learning.supervisor import DraftLearning, LearningSetup
from services.drafter.service import Drafter
from services.drafter.settings import DraftServingSettings
from services.drafter.sources import NoDrafts
from shared.broker import topology
from shared.broker.client import Broker
from shared.errors import ModelError
from shared.messages import DrafterHeartbeat, Generate, HiddenStates, LearningState, Verify
from shared.models.hidden_states import parts

SIZE = 4
PROMPT = list(range(20, 30))
STATE = LearningState(version=2, acceptance=0.5, shipped_acceptance=0.4)
SETUP = LearningSetup(
    HiddenDraftFolder.open(next(SHIPPED.glob("*/config.json")).parent), Path("target"), SIZE, LearningOptions(), None
)


class StubLearning:
    """Records a drafter's calls of its draft's learning."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.serving_sessions: list[int] = []
        self.observed: list[ObservedSession] = []
        self.state = STATE

    def recorder(self, generate: Generate) -> StateRecorder | None:
        return StateRecorder(SIZE, 100) if generate.fingerprint == self.fingerprint else None

    def serving(self, sessions: int) -> None:
        self.serving_sessions.append(sessions)

    def observe(self, session: ObservedSession) -> None:
        self.observed.append(session)


def drafter_with(broker: MemoryBroker, learning: StubLearning, length: int = 2) -> Drafter:
    options = DraftServingSettings(draft_source="lookup", min_timeout_ms=60_000, draft_length=length).options
    drafting = Drafting(
        {"hidden": NoDrafts()},
        "hidden",
        Controller("fixed", length),
        {},
        SIZE,
        1000,
        learning=learning,  # type: ignore[arg-type]
    )
    return Drafter("d1", "pool", options, drafting, cast("Broker", broker), None, None)


async def answer(drafter: Drafter, rounds: Inbox, tokens: int) -> None:
    """Answer rounds with a token each, and the states that they ask for, until the text has `tokens` of them."""
    for made in range(tokens):
        verify = await rounds.next()
        assert isinstance(verify, Verify)
        if verify.hidden_from is not None:
            bits = np.full((verify.base_len - verify.hidden_from, SIZE), 7, np.uint16)
            for part in parts(bits, verify.hidden_from, verify.hidden_format):
                await drafter.receive(HiddenStates(session=verify.session, round=verify.round, **vars(part)))
        finish = "length" if made == tokens - 1 else None
        await drafter.receive(
            builders.result(verify.session, verify.round, verify.base_len, [7], finish=finish, new_tokens=1)
        )


async def served(learning: StubLearning, *, tokens: int = 30, length: int = 2) -> None:
    broker, rounds = MemoryBroker(), Inbox()
    drafter = drafter_with(broker, learning, length)
    await drafter.take_requests()
    await broker.consume(broker.topology.verify_queue(), rounds)
    request = builders.generate(prompt=PROMPT, max_tokens=tokens, fingerprint="f")
    await broker.publish(request, topology.generate("pool"), persistent=True)
    await answer(drafter, rounds, tokens)
    await broker.server.handled()


async def test_an_ended_session_is_learned_from() -> None:
    learning = StubLearning("f")
    await served(learning)
    (session,) = learning.observed
    (text,) = session.texts()
    assert text.tokens.tolist() == [*PROMPT, *[7] * 30][text.start :]
    assert (text.start, text.prompt_len) == (0, len(PROMPT))
    assert (text.states == 7).all()


async def test_nothing_is_learned_while_a_session_is_served() -> None:
    learning = StubLearning("f")
    await served(learning)
    assert learning.serving_sessions == [1, 0]


async def test_sessions_of_another_target_or_without_drafts_are_not_learned_from() -> None:
    learning = StubLearning("another")
    await served(learning, tokens=3)
    assert learning.observed == []
    undrafted = StubLearning("f")
    await served(undrafted, tokens=3, length=0)
    assert undrafted.observed == []


async def test_heartbeats_carry_what_was_learned() -> None:
    broker, heartbeats = MemoryBroker(), Inbox()
    await broker.consume(broker.topology.own_queue("observer", "o", (topology.drafter("*"),)), heartbeats)
    beating = asyncio.create_task(drafter_with(broker, StubLearning("f")).beat())
    heartbeat = await heartbeats.next()
    beating.cancel()
    assert isinstance(heartbeat, DrafterHeartbeat)
    assert heartbeat.learning == STATE


class ScriptedConnection:
    """A learning process's end of a pipe: these messages, and its end."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages

    def recv(self) -> Any:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)


def test_weights_that_cannot_be_used_do_not_end_learning() -> None:
    taken: list[DraftWeights] = []

    def take(weights: DraftWeights) -> None:
        taken.append(weights)
        if len(taken) == 1:
            raise ModelError("of another shape")

    report = LearningReport(LearningOutcome.TAKEN, 1, 16, 100, 0.5, 0.4, {})
    learning = DraftLearning(SETUP, take)
    learning._receive(ScriptedConnection([LearningUse(report, 1.0), LearningUse(report, 1.0)]))  # type: ignore[arg-type]
    assert len(taken) == 2
    assert learning.state == LearningState(version=1, acceptance=0.5, shipped_acceptance=0.4)


def test_nothing_is_recorded_for_an_ended_learning_process() -> None:
    learning = DraftLearning(SETUP, lambda weights: None)
    assert learning.recorder(builders.generate()) is not None
    learning._receive(ScriptedConnection([]))  # type: ignore[arg-type]
    assert learning.recorder(builders.generate()) is None
    pending = learning._work.qsize()
    learning.observe(ObservedSession([1, 2], 1, builders.generate().sampling, StateRecorder(SIZE, 4)))
    assert learning._work.qsize() == pending
