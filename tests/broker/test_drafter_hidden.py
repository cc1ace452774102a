"""The drafter with a hidden-state draft, on real brokers; the test acts as scheduler and verifier."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import numpy as np
import pytest
import tiny
from drafter_peer import PROMPT, Peer, drafting, made_up_states
from patience import HANG_S
from prometheus_client import REGISTRY

from services.drafter.control import Controller, RoundTimes
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine
from services.drafter.settings import DrafterSettings
from services.drafter.sources import Draft, DraftRequest, States
from services.drafter.sources.hidden import WINDOW, HiddenDrafts
from shared.messages import Finish, HiddenFormat, HiddenStates, Sampling, Status, Verify
from shared.models.bfloat16 import to_floats
from shared.models.folder import ModelFolder
from shared.models.hidden_states import Bits, pack, parts, unpack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> HiddenDraftFolder:
    """A draft for the target in the folder `target` beside it."""
    path = tmp_path_factory.mktemp("models")
    return tiny.hidden_draft(path / "draft", tiny.target(path / "target"))


@pytest.fixture
async def peer(folder: HiddenDraftFolder, amqp_url: str, redis_url: str, namespace: str) -> AsyncIterator[Peer]:
    settings = DrafterSettings(
        amqp_url=amqp_url,
        redis_url=redis_url,
        namespace=namespace,
        target=folder.path.parent / "target",
        hidden_draft=folder.path,
        draft_dtype="float32",
        draft_source="hidden",
        stop_rule="fixed",
        draft_length=3,
        prepared_outcomes=0,
        min_timeout_ms=5000,
    )
    async with Peer.connected(settings) as connected:
        connected.vocabulary = folder.card.vocab_fingerprint
        yield connected


@pytest.fixture(scope="module")
def drafted(folder: HiddenDraftFolder) -> Callable[..., list[int]]:
    """Return a function that gives the model's draft after some tokens, with all states."""
    engine = DraftEngine(folder, ModelFolder(folder.path.parent / "target"), dtype="float32")

    def draft(
        tokens: Sequence[int], length: int = 3, form: HiddenFormat = HiddenFormat.BFLOAT16, window: int = 1000
    ) -> list[int]:
        source = HiddenDrafts(engine, window)
        round_ = Controller("fixed", length).session("hidden").ahead(length, temperature=0.0)
        states = States(0, received(made_up_states(len(tokens) - 1), form))
        found = source.propose([DraftRequest("s", tokens, Sampling(), round_, ("hidden",), states)])[0].tokens
        source.close("s")
        return found

    return draft


def received(bits: Bits, form: HiddenFormat) -> np.ndarray:
    """Return the rows as a drafter receives them."""
    if form is HiddenFormat.BFLOAT16:
        return to_floats(bits)
    rows, scales = pack(bits, form)
    count, size = bits.shape
    return unpack(
        HiddenStates(session="s", round=0, start=0, count=count, size=size, format=form, rows=rows, scales=scales)
    )


def counted(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


def other(token: int) -> int:
    return (token + 1) % tiny.VOCAB


async def test_states_make_the_next_draft_and_missing_ones_are_requested(
    peer: Peer, drafted: Callable[..., list[int]]
) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        assert (first.draft, first.hidden_from, first.hidden_format) == ([], 0, HiddenFormat.BFLOAT16)
        await peer.answer(first, [7], states=True)
        second = await peer.round()
        expected = drafted([*PROMPT, 7])
        assert (second.draft, second.hidden_from) == (expected, 5)
        assert len(second.acceptance) == 3
        committed = [*expected[:2], other(expected[2])]
        await peer.answer(second, committed, states=True)
        third = await peer.round()
        assert (third.draft, third.hidden_from) == (drafted([*PROMPT, 7, *committed]), 8)
        await peer.answer(third, [9], Finish.STOP)
        assert await peer.silent(0.3)


async def test_lost_states_are_requested_again(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        await peer.answer(await peer.round(), [7])
        second = await peer.round()
        assert (second.draft, second.hidden_from) == ([], 0)
        await peer.answer(second, [8], states=True)
        third = await peer.round()
        assert (third.draft, third.hidden_from) == (drafted([*PROMPT, 7, 8]), 6)
        await peer.answer(third, [9])
        fourth = await peer.round()
        assert (fourth.draft, fourth.hidden_from) == ([], 6)
        await peer.answer(fourth, [10], states=True)
        assert (await peer.round()).draft == drafted([*PROMPT, 7, 8, 9, 10])


async def test_repeated_late_or_misaddressed_states_are_ignored(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        await peer.send_states(first, [7])
        await peer.send_states(first.model_copy(update={"session": "nobody"}), [7])
        await peer.answer(first, [7], states=True)
        second = await peer.round()
        await peer.send_states(first, [7])
        await peer.answer(second, [8], states=True)
        await peer.send_states(first, [7])
        assert (await peer.round()).draft == drafted([*PROMPT, 7, 8])


async def test_states_of_another_size_are_ignored(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        await peer.send_states(first, [7], size=32)
        await peer.answer(first, [7])
        second = await peer.round()
        assert (second.draft, second.hidden_from) == ([], 0)
        await peer.answer(second, [8], states=True)
        assert (await peer.round()).draft == drafted([*PROMPT, 7, 8])


async def test_states_may_arrive_in_parts_and_out_of_order(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        bits = made_up_states(5)
        for start, stop in ((3, 5), (0, 2), (1, 4)):
            for part in parts(bits[start:stop], start, HiddenFormat.BFLOAT16):
                await peer.send_part(first, part)
        await peer.answer(first, [7])
        assert (await peer.round()).draft == drafted([*PROMPT, 7])


async def test_another_drafter_requests_all_states_again(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        await peer.answer(await peer.round(), [7], states=True)
        lost = await peer.round()
        assert (lost.drafter, len(lost.draft)) == ("d1", 3)
    async with drafting(peer.settings, "d2"):
        taken = await peer.round()
        assert (taken.drafter, taken.draft, taken.hidden_from) == ("d2", [], 0)
        await peer.answer(taken, [8], states=True)
        following = await peer.round()
        assert (following.draft, following.hidden_from) == (drafted([*PROMPT, 7, 8]), 6)


async def test_states_can_be_sent_as_int8(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    settings = peer.settings.model_copy(update={"hidden_format": "int8"})
    async with drafting(settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        assert first.hidden_format is HiddenFormat.INT8
        await peer.answer(first, [7], states=True)
        assert (await peer.round()).draft == drafted([*PROMPT, 7], form=HiddenFormat.INT8)


async def test_a_session_evicted_from_the_drafts_cache_starts_again(
    peer: Peer, drafted: Callable[..., list[int]]
) -> None:
    async with drafting(peer.settings.model_copy(update={"cache_tokens": 64}), "d1"):
        await peer.ask("s")
        await peer.answer(await peer.round(), [7], states=True)
        await peer.answer(await peer.round(), [8], states=True)
        third = await peer.round()
        assert third.draft == drafted([*PROMPT, 7, 8])
        await peer.ask("t")
        await peer.answer(await peer.round(), [7], states=True)
        assert len((await peer.round()).draft) == 3, "the other session has taken the room"
        await peer.answer(third, [9], states=True)
        fourth = await peer.round()
        assert (fourth.draft, fourth.hidden_from) == ([], 0)
        await peer.answer(fourth, [10], states=True)
        assert (await peer.round()).draft == drafted([*PROMPT, 7, 8, 9, 10])


async def test_a_session_that_lost_committed_tokens_drafts_again(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        await peer.answer(await peer.round(), [7], states=True)
        await peer.answer(await peer.round(), [8], states=True)
        third = await peer.round()
        assert (third.base_len, third.hidden_from) == (7, 6)
        await peer.send(third, 5, Status.CONFLICT, [7])  # Redis went back by a token
        fourth = await peer.round()
        assert (fourth.base_len, fourth.round, fourth.hidden_from) == (6, 3, 4)
        await peer.send_states(fourth, [8])
        await peer.send(fourth, 6, Status.COMMITTED, [8])
        fifth = await peer.round()
        assert (fifth.draft, fifth.hidden_from) == (drafted([*PROMPT, 7, 8]), 6)


@pytest.mark.parametrize("draft", ["auto", "combined"])
async def test_combined_copies_until_the_states_arrive(
    peer: Peer, drafted: Callable[..., list[int]], draft: str
) -> None:
    settings = peer.settings.model_copy(update={"draft_source": "auto"})
    async with drafting(settings, "d1"):
        await peer.ask("s", draft=draft)
        first = await peer.round()
        assert (first.draft, first.hidden_from) == ([3, 1, 2], 0), "copied: the prompt repeats itself"
        await peer.answer(first, [300], states=True)
        second = await peer.round()
        assert (second.draft, second.hidden_from) == (drafted([*PROMPT, 300]), 5), "nothing to copy after 300"


@pytest.mark.parametrize("draft", ["lookup", "none"])
async def test_sources_without_states_request_none(peer: Peer, draft: str) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s", draft=draft)
        assert (await peer.round()).hidden_from is None


async def test_a_drafter_that_never_drafts_requests_no_states(peer: Peer) -> None:
    async with drafting(peer.settings.model_copy(update={"draft_length": 0}), "d1"):
        await peer.ask("s")
        assert (await peer.round()).hidden_from is None


async def test_a_session_of_another_vocabulary_gets_drafts_by_lookup(peer: Peer) -> None:
    async with drafting(peer.settings, "d1"):
        peer.vocabulary = "another"
        await peer.ask("s")
        first = await peer.round()
        assert (first.draft, first.hidden_from) == ([3, 1, 2], None)


@pytest.fixture
def drafts_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Awaitable[None]]:
    """Return a function that waits until the model has made this many drafts."""
    made: list[Draft] = []
    original = HiddenDrafts.propose

    def propose(source: HiddenDrafts, requests: Sequence[DraftRequest]) -> list[Draft]:
        found = original(source, requests)
        made.extend(draft for draft in found if draft.steps)
        return found

    monkeypatch.setattr(HiddenDrafts, "propose", propose)

    async def wait(count: int) -> None:
        async with asyncio.timeout(HANG_S):
            while len(made) < count:  # noqa: ASYNC110 - drafts are made in a thread
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)  # until the drafter has its answer

    return wait


# Price and draft cap of the scheduler.


async def test_under_a_draft_cap_of_zero_rounds_are_plain(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    async with drafting(peer.settings, "d1"):
        await peer.ask("s")
        first = await peer.round()
        await peer.load(draft_cap=0)
        await peer.answer(first, [7], states=True)
        second = await peer.round()
        assert (second.draft, second.hidden_from) == ([], None), "states would be useless"
        await peer.load(draft_cap=2)
        await peer.answer(second, [8])
        third = await peer.round()
        assert (third.draft, third.hidden_from) == ([], len(PROMPT)), "the states since then were not sent"
        await peer.answer(third, [9], states=True)
        assert (await peer.round()).draft == drafted([*PROMPT, 7, 8, 9], 2)


async def test_a_price_shortens_drafts_and_a_high_one_ends_drafting(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, drafts_made: Callable[[int], Awaitable[None]]
) -> None:
    # Draft steps then cost nothing: on a busy machine their measured time alone could end drafting.
    monkeypatch.setattr(RoundTimes, "learn_draft", lambda *_: None)
    settings = peer.settings.model_copy(update={"stop_rule": "marginal", "draft_length": 8})
    lengths = []
    async with drafting(settings, "d1"):
        for session, price_ms in (("free", 0.0), ("dear", 15.0)):
            await peer.load(price_ms=price_ms)
            await peer.ask(session)
            await peer.answer(await peer.round(), [7], states=True)
            second = await peer.round()
            lengths.append(len(second.draft))
            await peer.answer(second, second.draft, Finish.STOP)
        assert 0 < lengths[1] < lengths[0]
        await peer.load(price_ms=1e6)
        await peer.ask("plain")
        steps = counted("wisp_draft_steps_total")
        rounds: list[Verify] = []
        for token in range(10, 16):
            rounds.append(await peer.round())
            if rounds[-1].hidden_from == 8:
                await drafts_made(3)
            await peer.answer(rounds[-1], [token], states=rounds[-1].hidden_from is not None)
        assert [verify.hidden_from for verify in rounds] == [None, None, None, 0, 8, None]
        assert [verify.draft for verify in rounds] == [[]] * 6, "a probe is drafted beside a round and not sent"
        assert counted("wisp_draft_steps_total") == steps + 1


async def test_of_a_long_prompt_the_last_states_are_requested(peer: Peer, drafted: Callable[..., list[int]]) -> None:
    prompt = list(range(1, 41))
    async with drafting(peer.settings, "d1"):
        await peer.ask("s", prompt=prompt)
        first = await peer.round()
        assert (first.draft, first.hidden_from) == ([], 40 - WINDOW - 1)
        await peer.answer(first, [7], states=True)
        second = await peer.round()
        assert (second.draft, second.hidden_from) == (drafted([*prompt, 7], window=WINDOW), 40)


# Ahead of the result.


@pytest.fixture
def made_ahead(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a draft has been made while a round was in flight."""
    happened = threading.Event()
    original = HiddenDrafts.ahead

    def ahead(source: HiddenDrafts, requests: Sequence[object]) -> list[object]:
        found = original(source, requests)  # type: ignore[arg-type]
        if any(found):
            happened.set()
        return found  # type: ignore[return-value]

    monkeypatch.setattr(HiddenDrafts, "ahead", ahead)
    return happened


def made_for_rounds(outcome: str) -> float:
    return counted("wisp_drafts_ahead_total", outcome=outcome)


OUTCOMES = 16


@pytest.mark.parametrize("bonus", ["likely", "unlikely"])
async def test_a_prepared_draft_is_sent_after_the_outcome_it_is_for(
    peer: Peer, drafted: Callable[..., list[int]], made_ahead: threading.Event, bonus: str
) -> None:
    before = {outcome: made_for_rounds(outcome) for outcome in ("kept", "dropped")}
    async with drafting(peer.settings.model_copy(update={"prepared_outcomes": OUTCOMES}), "d1"):
        await peer.ask("s")
        await peer.answer(await peer.round(), [7], states=True)
        second = await peer.round()
        longer = drafted([*PROMPT, 7], 7)
        assert second.draft == longer[:3]
        assert await asyncio.to_thread(made_ahead.wait, 10)
        if bonus == "likely":
            # Without states the model cannot draft anew.
            await peer.answer(second, longer[:4])
            third = await peer.round()
            assert (third.base_len, third.draft, third.hidden_from) == (10, longer[4:7], 5)
            await peer.answer(third, [*longer[4:6], other(longer[6])], states=True)
            text = [*PROMPT, 7, *longer[:6], other(longer[6])]
            assert (await peer.round()).draft == drafted(text)
        else:
            committed = [*longer[:3], other(longer[3])]
            await peer.answer(second, committed, states=True)
            third = await peer.round()
            assert (third.base_len, third.draft) == (10, drafted([*PROMPT, 7, *committed]))
    made = {outcome: made_for_rounds(outcome) - count for outcome, count in before.items()}
    assert made == ({"kept": 1, "dropped": 0} if bonus == "likely" else {"kept": 0, "dropped": 1})


async def test_no_draft_ahead_exceeds_the_token_limit(
    peer: Peer, drafted: Callable[..., list[int]], made_ahead: threading.Event
) -> None:
    async with drafting(peer.settings.model_copy(update={"prepared_outcomes": OUTCOMES}), "d1"):
        await peer.ask("s", max_tokens=7)
        await peer.answer(await peer.round(), [7], states=True)
        second = await peer.round()
        longer = drafted([*PROMPT, 7], 5)
        assert await asyncio.to_thread(made_ahead.wait, 10)
        await peer.answer(second, longer[:4])
        assert (await peer.round()).draft == longer[4:5], "one token, and the bonus token"
