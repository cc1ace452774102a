"""The rounds of one session in its drafter, without brokers: what is sent, asked for and computed while drafts rest."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import builders
import numpy as np
import pytest
from patience import HANG_S

from services.drafter.control import Controller, DraftDecision, DraftToken
from services.drafter.control.controller import FIRST_RUN, LONGEST_WAIT, MOST_RUN, RETURN_SHARE
from services.drafter.core.draft import DraftSource, NoDrafts
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.session import RoundTimer, RoundTimers
from services.drafter.link import Deliver, DirectLink
from services.drafter.serving import ServedSession
from services.drafter.settings import DraftServingSettings
from services.drafter.sources import AheadRequest, Draft, DraftRequest, PreparedDraft
from services.drafter.worker import SourceWorker
from shared.messages import HiddenStates, Slo, Verify
from shared.models.hidden_states import parts

SIZE = 4
NEVER_RIGHT = 9


class Hidden:
    """A source that reads hidden states; its tokens are never right. Records its calls."""

    blocking = True

    def __init__(self) -> None:
        self.requests: list[DraftRequest] = []
        self.computed = 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        self.requests.append(request)
        tokens: list[int] = []
        if request.states is None or not request.round.wants("hidden"):
            return Draft()
        computed, self.computed = len(request.tokens) - self.computed, len(request.tokens)
        steps = 0
        while request.round.wants("hidden"):
            steps += 1
            if request.round.add(DraftToken("hidden", 0.5)) is DraftDecision.DROP:
                return Draft(tokens, {"hidden": steps}, computed, dropped=NEVER_RIGHT)
            tokens.append(NEVER_RIGHT)
        return Draft(tokens, {"hidden": steps}, computed)

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        return [[] for _ in requests]

    def computes(self, request: DraftRequest) -> bool:
        return request.round.wants("hidden")

    def starts_at(self, session_id: str, count: int) -> int:
        return min(self.computed, count - 1)

    def close(self, session_id: str) -> None:
        pass


@asynccontextmanager
async def serving(
    source: DraftSource, controller: Controller, names: tuple[str, ...], prompt: list[int], slo: Slo | None = None
) -> AsyncIterator[Verifier]:
    """Run one session against a verifier that the test plays."""
    sent: asyncio.Queue[Verify] = asyncio.Queue()
    options = DraftServingSettings(draft_source="lookup", stop_rule="marginal", min_timeout_ms=60_000).options
    worker = SourceWorker(source)

    def open_link(deliver: Deliver) -> DirectLink:
        return DirectLink(sent.put, deliver)

    session = ServedSession(
        builders.generate(prompt=prompt, stop_ids=[], max_tokens=400, slo=slo),
        "d1",
        options,
        RoundTimers(60_000),
        worker,
        names,
        controller.session(*names, copying=("lookup",)),
        HiddenRows(SIZE, 1000) if "hidden" in names else None,
        8 if "lookup" in names else 0,
        open_link,
    )
    tasks = [asyncio.create_task(worker.work()), asyncio.create_task(session.run())]
    try:
        yield Verifier(session, sent)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Verifier:
    """Answers rounds with the target's token 7, and with the hidden states that they ask for."""

    def __init__(self, session: ServedSession, sent: asyncio.Queue[Verify]) -> None:
        self.session = session
        self.sent = sent

    async def round(self, verify_ms: Callable[[], float] = lambda: 20.0) -> Verify:
        """Take the next round and answer it; return it. verify_ms: asked when it has been computed."""
        verify = await asyncio.wait_for(self.sent.get(), HANG_S)
        await asyncio.sleep(0.02)  # the batch
        if verify.hidden_from is not None:
            bits = np.zeros((verify.base_len - verify.hidden_from, SIZE), np.uint16)
            for part in parts(bits, verify.hidden_from, verify.hidden_format):
                states = HiddenStates(session=verify.session, round=verify.round, **vars(part))
                await self.session.receive(states)
        result = builders.result(verify.session, verify.round, verify.base_len, [7], verify_ms=verify_ms())
        await self.session.receive(result.model_copy(update=_counts(verify)))
        return verify

    async def begin_run(self, left: int) -> Verify:
        """Answer the next round with a token, after which the verifier goes on by itself."""
        verify = await asyncio.wait_for(self.sent.get(), HANG_S)
        await asyncio.sleep(0.02)  # the batch
        result = builders.result(verify.session, verify.round, verify.base_len, [7], run_left=left, verify_ms=20.0)
        await self.session.receive(result)
        return verify

    async def report(self, round_: int, base_len: int, tokens: int, left: int) -> None:
        """Report tokens of the run."""
        await self.session.receive(
            builders.result("s", round_, base_len, [7] * tokens, run=True, run_left=left, new_tokens=tokens)
        )

    async def silent(self) -> bool:
        """Return whether no round has been sent in the meantime."""
        await asyncio.sleep(0.1)
        return self.sent.empty()


def _counts(verify: Verify) -> dict[str, object]:
    draft = len(verify.draft)
    return {"drafted": draft, "trimmed_to": draft, "accepted": 0, "new_tokens": draft + 1}


def dear(controller: Controller) -> Controller:
    """Make verification so dear that no draft pays."""
    controller.times.price_ms = 1e6
    return controller


async def test_a_resting_session_sends_what_plain_decoding_sends() -> None:
    source = Hidden()
    async with serving(source, dear(Controller("marginal", 8)), ("hidden",), [1, 2, 3]) as verifier:
        resting = [await verifier.round() for _ in range(40)]
    async with serving(NoDrafts(), Controller("marginal", 8), (), [1, 2, 3]) as verifier:
        plain = [await verifier.round() for _ in range(40)]
    changing = {"slack_ms", "draft_ms", "hidden_from"}
    assert [r.model_dump(exclude=changing) for r in resting] == [p.model_dump(exclude=changing) for p in plain]
    asking = [r.round for r in resting if r.hidden_from is not None]
    assert len(asking) <= 2 * len(source.requests) + 2
    assert 1 <= len(source.requests) <= 8, "only probes reach the model"
    assert all(request.round.silent for request in source.requests)


async def test_a_probe_teaches_that_the_source_is_wrong() -> None:
    source, controller = Hidden(), dear(Controller("marginal", 8))
    before = controller.calibration.logit("hidden", 1.0)
    async with serving(source, controller, ("hidden",), [1, 2, 3]) as verifier:
        for _ in range(12):
            await verifier.round()
    assert controller.calibration.logit("hidden", 1.0) < before


async def test_a_round_beside_a_probe_does_not_teach_the_verifiers_time() -> None:
    source, controller = Hidden(), dear(Controller("marginal", 8))
    async with serving(source, controller, ("hidden",), [1, 2, 3]) as verifier:
        for _ in range(30):
            before = len(source.requests)
            await verifier.round(lambda before=before: 20.0 if len(source.requests) == before else 60.0)  # type: ignore[misc]
    assert source.requests
    assert controller.times._verify.base_ms == pytest.approx(20, abs=0.5)


async def test_a_long_prompt_is_computed_beside_a_plain_round() -> None:
    source, controller = Hidden(), Controller("marginal", 8)
    async with serving(source, controller, ("hidden",), list(range(1, 50))) as verifier:
        first, second, third = [await verifier.round() for _ in range(3)]
    assert (first.draft, first.hidden_from) == ([], 0)
    assert (second.draft, second.hidden_from) == ([], 49)
    assert [request.round.silent for request in source.requests[:2]] == [True, False]
    assert len(third.draft) > 0


async def test_states_are_asked_for_from_the_round_before_a_probe_on() -> None:
    source = Hidden()
    async with serving(source, dear(Controller("marginal", 8)), ("hidden",), [1, 2, 3]) as verifier:
        rounds = [await verifier.round() for _ in range(6)]
    assert [verify.hidden_from for verify in rounds] == [None, None, None, 0, 6, None]


def with_runs(controller: Controller, run_ms: float = 20.0) -> Controller:
    """Let the verifiers decode by themselves at this time per token."""
    controller.times.apply_load(builders.load(controller.times.price_ms, run_ms=run_ms))
    return controller


async def test_a_session_without_drafts_leaves_all_tokens_to_the_verifier() -> None:
    async with serving(NoDrafts(), with_runs(Controller("marginal", 8)), (), [1, 2, 3]) as verifier:
        assert (await verifier.begin_run(5)).run_tokens == MOST_RUN
        await verifier.report(1, 4, 3, 2)
        assert await verifier.silent(), "the verifier goes on"
        await verifier.report(2, 7, 2, 0)
        following = await verifier.round()
    assert (following.round, following.base_len, following.run_tokens) == (3, 9, MOST_RUN)


def test_a_suite_that_takes_no_drafts_leaves_all_tokens_to_the_verifier() -> None:
    controller = Controller("marginal", 8)
    controller.times.apply_load(builders.load(0.0, draft_cap=0, run_ms=20.0))
    control = controller.session("hidden")
    for _ in range(300):
        round_ = control.begin(8, 0.0)
        assert control.run_tokens(round_) == MOST_RUN
        control.settle(round_, 0, 0)


def test_states_that_never_come_keep_no_session_from_runs() -> None:
    control = with_runs(Controller("marginal", 8), run_ms=54.0).session("hidden")
    granted = []
    for _ in range(8):
        round_ = control.begin(8, 0.0, unready={"hidden"})
        granted.append(control.run_tokens(round_))
        control.settle(round_, 0, 0)
    assert granted[0] == 0
    assert granted[-1] > 0


async def test_the_first_token_counts_from_when_it_came_and_not_after_a_run() -> None:
    slo = Slo(ttft_ms=10_000.0, tpot_ms=100.0)
    controller = with_runs(Controller("marginal", 8))
    async with serving(NoDrafts(), controller, (), [1, 2, 3], slo) as verifier:
        began = time.monotonic()
        await verifier.begin_run(5)
        await asyncio.sleep(0.3)
        await verifier.report(1, 4, 5, 0)
        following = await verifier.round()
        passed_ms = (time.monotonic() - began) * 1000
    # Six tokens have come; the seventh is due 600 ms after the first, of which 300 or more have passed.
    assert following.slack_ms is not None
    assert 600.0 - passed_ms < following.slack_ms < 350.0


async def test_without_runs_every_token_takes_a_round() -> None:
    async with serving(NoDrafts(), Controller("marginal", 8), (), [1, 2, 3]) as verifier:
        assert [(await verifier.round()).run_tokens for _ in range(3)] == [0, 0, 0]


async def test_a_run_that_falls_silent_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundTimer, "timeout_ms", lambda *_: 50.0)
    async with serving(NoDrafts(), with_runs(Controller("marginal", 8)), (), [1, 2, 3]) as verifier:
        await verifier.begin_run(60)
        asking = await verifier.begin_run(0)
    assert (asking.round, asking.base_len) == (1, 4)


async def test_a_session_whose_sources_rest_is_in_a_run_until_the_next_trial() -> None:
    controller = with_runs(dear(Controller("marginal", 8)))
    async with serving(Hidden(), controller, ("hidden",), [1, 2, 3]) as verifier:
        verify = await verifier.begin_run(MOST_RUN)
        assert verify.run_tokens == MOST_RUN
        while verify.hidden_from is None:
            assert verify.run_tokens
            await verifier.report(verify.round + 1, verify.base_len + 1, verify.run_tokens, 0)
            verify = await verifier.begin_run(MOST_RUN)
    assert verify.base_len <= 3 + LONGEST_WAIT + 3, "then it asks for the states that a trial needs"


def test_runs_of_a_session_that_has_drafted_grow() -> None:
    controller = dear(with_runs(Controller("marginal", 8), run_ms=50.0))
    control = controller.session("hidden")
    granted = []
    for _ in range(40):
        round_ = control.begin(8, 0.0)
        if "hidden" in round_.probed:
            round_.add(DraftToken("hidden", 0.5))
            granted.append(control.run_tokens(round_))
        control.settle(round_, 0, 0)
        control.learn_run(control.run_tokens(round_), 0.0)
    assert granted[0] >= math.ceil((controller.times.base_ms - 50.0) / (RETURN_SHARE * 50.0))
    assert granted == sorted(granted)
    assert FIRST_RUN <= granted[0] < granted[-1] == MOST_RUN


@pytest.mark.parametrize(("names", "copies"), [(("lookup",), 8), ((), 0)])
async def test_rounds_limit_the_copies_of_a_run(names: tuple[str, ...], copies: int) -> None:
    async with serving(NoDrafts(), with_runs(Controller("marginal", 8)), names, [1, 2, 3]) as verifier:
        assert (await verifier.begin_run(5)).run_copies == copies


@pytest.mark.parametrize("right", [True, False])
async def test_a_run_is_halted_for_a_source_that_its_probe_shows_to_pay(right: bool) -> None:
    source, controller = Hidden(), with_runs(Controller("marginal", 8), run_ms=54.0 if right else 1.0)
    async with serving(source, controller, ("hidden",), [1, 2, 3]) as verifier:
        await verifier.begin_run(60)
        await verifier.report(1, 4, 4, 56)
        assert await verifier.silent(), "nothing was probed"
        verifier.session._drafts.settle_probes = lambda: {"hidden"}  # type: ignore[method-assign]
        await verifier.report(1, 8, 4, 52)
        assert await verifier.silent() is not right


async def test_an_ended_session_leaves_its_wait_for_a_probe_to_the_next() -> None:
    controller = with_runs(dear(Controller("marginal", 8)))
    async with serving(Hidden(), controller, ("hidden",), [1, 2, 3]) as verifier:
        await verifier.begin_run(60)
        await verifier.report(1, 4, 20, 40)
        assert await verifier.silent()
        waited = verifier.session._control._idle["hidden"]
    assert waited >= 20
    assert controller.session("hidden")._idle == {"hidden": waited}
    assert controller.session("hidden")._idle == {"hidden": 0}, "only one session takes it over"


def test_a_session_that_only_waits_for_states_gets_no_run() -> None:
    control = with_runs(Controller("marginal", 8), run_ms=54.0).session("hidden")
    waiting = control.begin(8, 0.0, unready={"hidden"})
    assert control.run_tokens(waiting) == 0


async def test_a_round_in_flight_is_sent_again_on_request() -> None:
    async with serving(NoDrafts(), Controller("marginal", 8), (), [1, 2, 3]) as verifier:
        lost = await asyncio.wait_for(verifier.sent.get(), HANG_S)
        verifier.session.send_again()
        again = await asyncio.wait_for(verifier.sent.get(), HANG_S)
        assert (again.round, again.attempt, lost.attempt) == (lost.round, 1, 0)
        verifier.session.send_again(60.0)
        assert await verifier.silent(), "it was sent a moment ago"
