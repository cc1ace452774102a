"""A drafter that emulates slow hardware, on real brokers; the test acts as scheduler and verifier."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from drafter_peer import Peer, drafting
from patience import HANG_S

from services.drafter import service
from services.drafter.control import Controller, DraftToken
from services.drafter.core.draft import WithoutStates
from services.drafter.drafting import Drafting
from services.drafter.serving import ServedSession
from services.drafter.settings import DrafterSettings
from services.drafter.sources import AheadRequest, Draft, DraftRequest, PreparedDraft
from shared.broker import topology
from shared.messages import Cancel, Finish, HiddenStates, Result, Status, Verify


class ScriptedSource(WithoutStates):
    """Proposes 20, 21 and 22 in three steps, and 30 ahead of a result that ends in 9, without delay."""

    blocking = True

    def __init__(self) -> None:
        self.made_ahead = threading.Event()
        self.slow_calls = 0
        """Calls of `ahead` that end only when they are no longer wanted."""
        self.most: list[int] = []
        """Most outcomes of each call of `ahead`."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        for request in requests:
            for _ in range(3):
                request.round.add(DraftToken("model", 0.9))
        return [Draft([20, 21, 22], {"model": 3}, computed=5) for _ in requests]

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        prepared: list[list[PreparedDraft]] = []
        self.most += [one.most for one in requests]
        if self.slow_calls:
            self.slow_calls -= 1
            self.made_ahead.set()
            while requests[0].wanted():
                time.sleep(0.001)
            return [[] for _ in requests]
        for one in requests:
            round_ = one.begin(len(one.draft.tokens) + 1)
            round_.add(DraftToken("model", 0.9))
            prepared.append([PreparedDraft([*one.draft.tokens, 9], Draft([30], {"model": 1}), round_)])
        self.made_ahead.set()
        return prepared

    def close(self, session_id: str) -> None:
        pass


@dataclass
class Setup:
    """A drafter's peer, with the controller and the source that the drafter uses."""

    peer: Peer
    controller: Controller
    source: ScriptedSource


def profile(folder: Path, step_ms: float, uplink_ms: float, downlink_ms: float, jitter_ms: float = 0.0) -> str:
    path = folder / "device.toml"
    path.write_text(
        f"[draft]\nstep_ms = {step_ms}\nprompt_ms = 1\n[uplink]\ndelay_ms = {uplink_ms}\njitter_ms = {jitter_ms}\n"
        f"[downlink]\ndelay_ms = {downlink_ms}\njitter_ms = {jitter_ms}\n"
    )
    return str(path)


@pytest.fixture
async def base(amqp_url: str, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setup]:
    settings = DrafterSettings(
        amqp_url=amqp_url,
        redis_url=redis_url,
        namespace=namespace,
        draft_source="model",
        draft_model=Path("made up"),
        stop_rule="fixed",
        draft_length=3,
        min_timeout_ms=5000,
    )
    controller = Controller("fixed", 3)
    source = ScriptedSource()
    monkeypatch.setattr(service, "load_drafting", lambda _: Drafting({"model": source}, "model", controller, {}))
    async with Peer.connected(settings) as peer:
        yield Setup(peer, controller, source)


def emulating(peer: Peer, profile_file: str, *, outcomes: int = 0) -> DrafterSettings:
    return peer.settings.model_copy(update={"device_profile": profile_file, "prepared_outcomes": outcomes})


async def test_rounds_take_the_emulated_time_and_the_controller_learns_it(base: Setup, tmp_path: Path) -> None:
    peer, controller = base.peer, base.controller
    loop = asyncio.get_running_loop()
    async with drafting(emulating(peer, profile(tmp_path, step_ms=60, uplink_ms=50, downlink_ms=40)), "d1"):
        asked = loop.time()
        await peer.ask("s")
        first = await peer.round()
        assert first.draft_ms == 3 * 60 + 4, "three steps, and four tokens computed along with the first"
        assert loop.time() - asked >= (first.draft_ms + 50) / 1000
        answered = loop.time()
        await peer.answer(first, [20, 21, 22, 7])
        second = await peer.round()
        assert loop.time() - answered >= (40 + second.draft_ms + 50) / 1000
        await peer.answer(second, [9], Finish.STOP)
        assert await peer.silent(0.3)
    assert controller.times.step_ms("model") == 60, "the time of the profile, not of this machine"
    assert controller.times.base_ms >= 80, "90 ms on the link beside the 50 ms of verifying in the results"


async def test_sessions_wait_at_the_same_time(base: Setup, tmp_path: Path) -> None:
    peer = base.peer
    async with drafting(emulating(peer, profile(tmp_path, step_ms=300, uplink_ms=100, downlink_ms=0)), "d1"):
        for i in range(50):
            await peer.ask(f"s{i}")
        async with asyncio.timeout(40):  # one after another they would take 50 seconds
            rounds = [await peer.round() for _ in range(50)]
        assert len({r.session for r in rounds}) == 50


@pytest.mark.parametrize("step_ms", [0, 60_000])
async def test_cancelling_a_session_ends_its_wait(base: Setup, tmp_path: Path, step_ms: float) -> None:
    """Once while the emulated hardware drafts, once while its round is on the link."""
    peer = base.peer
    slow = profile(tmp_path, step_ms=step_ms, uplink_ms=60_000, downlink_ms=0)
    settings = emulating(peer, slow).model_copy(update={"max_sessions": 1})
    async with drafting(settings, "d1"):
        await peer.ask("slow")
        async with asyncio.timeout(HANG_S):
            while await pending_requests(peer) > 0:  # noqa: ASYNC110 - the broker has no event for it
                await asyncio.sleep(0.05)
        await peer.ask("next")
        await asyncio.sleep(0.3)
        assert await pending_requests(peer) == 1, "the drafter serves one session at a time"
        assert peer.rounds.empty()
        await peer.store.cancel("slow")
        await peer.broker.publish(Cancel(session="slow", reason="client left"), topology.CANCEL)
        async with asyncio.timeout(HANG_S):
            while await pending_requests(peer) > 0:  # noqa: ASYNC110 - the broker has no event for it
                await asyncio.sleep(0.05)


async def pending_requests(peer: Peer) -> int:
    """Return the number of requests that no drafter has taken yet."""
    queue = peer.broker.topology.generate_queue()
    channel = await peer.broker._connection.channel()
    declared = await channel.declare_queue(queue.name, passive=True)
    await channel.close()
    return declared.declaration_result.message_count or 0


async def test_jitter_delivers_hidden_states_before_their_result(
    base: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = base.peer
    arrived: list[HiddenStates | Result] = []
    take = ServedSession._deliver

    async def seen(self: ServedSession, message: HiddenStates | Result) -> None:
        arrived.append(message)
        await take(self, message)

    monkeypatch.setattr(ServedSession, "_deliver", seen)
    async with drafting(emulating(peer, profile(tmp_path, 0, 1, 1, jitter_ms=10)), "d1"):
        await peer.ask("s", max_tokens=40)
        for _ in range(6):
            verify = await peer.round()
            wanting = verify.model_copy(update={"hidden_from": 0})
            await peer.answer(wanting, [7], states=True)
        await peer.answer(await peer.round(), [7], Finish.STOP)
        assert await peer.silent(0.3)
    rounds = [message.round for message in arrived]
    assert rounds == sorted(rounds)
    assert [isinstance(message, Result) for message in arrived[:12]] == [False, True] * 6


@pytest.mark.parametrize(("step_ms", "kept"), [(1, True), (600, False)])
async def test_a_draft_made_ahead_is_used_only_if_the_hardware_had_the_time(
    base: Setup, tmp_path: Path, step_ms: float, kept: bool
) -> None:
    peer = base.peer
    async with drafting(emulating(peer, profile(tmp_path, step_ms, 5, 5), outcomes=1), "d1"):
        await peer.ask("s")
        first = await peer.round()
        assert await asyncio.to_thread(base.source.made_ahead.wait, HANG_S)
        # The emulated hardware needs two steps for it: 2 ms, or 1200 ms.
        await asyncio.sleep(0.1)
        await peer.answer(first, [20, 21, 22, 9])
        second = await peer.round()
        assert second.draft == ([30] if kept else [20, 21, 22])
        assert second.draft_ms == (0 if kept else 3 * step_ms + 4)
        await peer.answer(second, [5], Finish.STOP)
        assert await peer.silent(0.3)


async def test_fewer_outcomes_are_prepared_where_rounds_end_too_soon(base: Setup) -> None:
    peer, source = base.peer, base.source
    source.slow_calls = 1
    async with drafting(peer.settings.model_copy(update={"prepared_outcomes": 8}), "d1"):
        await peer.ask("s")
        for draft in ([20, 21, 22], [20, 21, 22], [30]):
            verify = await peer.round()
            assert verify.draft == draft
            assert await asyncio.to_thread(source.made_ahead.wait, HANG_S)
            source.made_ahead.clear()
            await peer.answer(verify, [*draft, 9])
        await peer.answer(await peer.round(), [5], Finish.STOP)
        assert await peer.silent(0.3)
    assert source.most[:3] == [8, 4, 5], "half as many after the first round, and one more after each that sufficed"


async def test_a_late_copy_of_a_round_changes_nothing(base: Setup, tmp_path: Path) -> None:
    peer = base.peer
    settings = emulating(peer, profile(tmp_path, 1, 150, 150)).model_copy(update={"min_timeout_ms": 100.0})
    async with drafting(settings, "d1"):
        await peer.ask("s")
        committed: dict[int, Verify] = {}
        while len(committed) < 8:
            verify = await peer.round()
            last = len(committed) == 7
            if verify.round in committed:
                assert verify.base_len == committed[verify.round].base_len
                await peer.send(verify, verify.base_len, Status.COMMITTED, [verify.round + 7])
                continue
            committed[verify.round] = verify
            await peer.answer(verify, [verify.round + 7], Finish.STOP if last else None)
        assert sorted(committed) == list(range(8))
        stored = (await peer.store.read(["s"]))[0]
        assert stored is not None
        assert stored.tokens[5:] == [round_ + 7 for round_ in range(8)]
