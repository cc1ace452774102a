"""The rounds of one session in its drafter, without brokers: what is sent, asked for and computed while drafts rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import builders
import numpy as np

from services.drafter.control import Controller, DraftDecision, DraftToken
from services.drafter.core.draft import DraftSource, NoDrafts
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.session import RoundTimers
from services.drafter.link import Deliver, DirectLink
from services.drafter.serving import ServedSession
from services.drafter.settings import DraftServingSettings
from services.drafter.sources import Draft, DraftAhead, DraftRequest
from services.drafter.worker import SourceWorker
from shared.messages import HiddenStates, Verify
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

    def ahead(self, requests: Sequence[tuple[DraftRequest, Draft]]) -> list[DraftAhead | None]:
        return [None for _ in requests]

    def computes(self, request: DraftRequest) -> bool:
        return request.round.wants("hidden")

    def starts_at(self, session_id: str, count: int) -> int:
        return min(self.computed, count - 1)

    def close(self, session_id: str) -> None:
        pass


@asynccontextmanager
async def serving(
    source: DraftSource, controller: Controller, names: tuple[str, ...], prompt: list[int]
) -> AsyncIterator[Verifier]:
    """Run one session against a verifier that the test plays."""
    sent: asyncio.Queue[Verify] = asyncio.Queue()
    settings = DraftServingSettings(draft_source="lookup", stop_rule="marginal", min_timeout_ms=60_000)
    worker = SourceWorker(source)

    def open_link(deliver: Deliver) -> DirectLink:
        return DirectLink(sent.put, deliver)

    session = ServedSession(
        builders.generate(prompt=prompt, stop_ids=[], max_tokens=400),
        "d1",
        settings,
        RoundTimers(60_000),
        worker,
        names,
        controller.session(*names),
        HiddenRows(SIZE, 1000) if names else None,
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
        self._session = session
        self._sent = sent

    async def round(self) -> Verify:
        """Take the next round and answer it; return it."""
        verify = await asyncio.wait_for(self._sent.get(), 10)
        await asyncio.sleep(0.02)  # the batch
        if verify.hidden_from is not None:
            bits = np.zeros((verify.base_len - verify.hidden_from, SIZE), np.uint16)
            for part in parts(bits, verify.hidden_from, verify.hidden_format):
                states = HiddenStates(session=verify.session, round=verify.round, **vars(part))
                await self._session.receive(states)
        result = builders.result(verify.session, verify.round, verify.base_len, [7], verify_ms=20.0)
        await self._session.receive(result.model_copy(update=_counts(verify)))
        return verify


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
