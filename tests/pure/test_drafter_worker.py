"""The source worker: batched calls, failures and prepared drafts; and the counts of verified tokens."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from builders import result

from services.drafter.control import Controller, DraftRound, DraftToken
from services.drafter.core.session import verified_counts
from services.drafter.sources import AheadRequest, Draft, DraftRequest, PreparedDraft
from services.drafter.worker import SourceWorker
from shared.messages import Sampling


class Scripted:
    """A source that proposes token 7 after `go` is set, or fails; records its calls."""

    blocking = True

    def __init__(self) -> None:
        self.go = threading.Event()
        self.called = threading.Event()
        self.fails = False
        self.waits_until_unwanted = False
        self.preparing = threading.Event()
        self.calls: list[list[str]] = []

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.calls.append([request.session_id for request in requests])
        self.called.set()
        assert self.go.wait(10)
        for request in requests:
            request.round.add(DraftToken("model", 0.9))
        if self.fails:
            raise ValueError("broken")
        return [Draft([7], {"model": 1}) for _ in requests]

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        self.calls.append([f"after {one.request.session_id}" for one in requests])
        if self.waits_until_unwanted:
            self.preparing.set()
            while requests[0].wanted():
                time.sleep(0.001)
        return [[PreparedDraft([*one.draft.tokens, 8], Draft([9]), one.begin(1))] for one in requests]

    def computes(self, request: DraftRequest) -> bool:
        return request.session_id != "copies"

    def starts_at(self, session_id: str, count: int) -> int:
        return 0

    def close(self, session_id: str) -> None:
        self.calls.append([f"close {session_id}"])


@asynccontextmanager
async def working(source: Scripted) -> AsyncIterator[SourceWorker]:
    worker = SourceWorker(source)
    task = asyncio.create_task(worker.work())
    yield worker
    source.go.set()
    task.cancel()


async def test_a_request_that_needs_no_model_waits_for_no_call() -> None:
    class Copying(Scripted):
        def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
            return [Draft([5])] if requests[0].session_id == "copies" else super().propose(requests)

    source = Copying()
    async with working(source) as worker:
        running = asyncio.create_task(worker.draft(request("x")))
        await asyncio.to_thread(source.called.wait, 10)
        assert await worker.draft(request("copies")) == (Draft([5]), 0.0)
        assert not running.done()
        source.go.set()
        assert (await running)[0] == Draft([7], {"model": 1})


async def test_a_failure_without_a_model_leaves_the_draft_empty() -> None:
    source = Scripted()
    source.go.set()
    source.fails = True
    async with working(source) as worker:
        assert await worker.draft(request("copies")) == (Draft(), 0.0)


def request(session_id: str) -> DraftRequest:
    return DraftRequest(session_id, [1, 2], Sampling(), round_of(4), ("model",))


def after(session_id: str) -> AheadRequest:
    return AheadRequest(request(session_id), Draft([3]), round_of, 4)


def round_of(length: int) -> DraftRound:
    return Controller("fixed", 8).session("model").ahead(length, 0.0)


async def test_requests_during_a_call_share_the_next_and_drafts_precede_aheads() -> None:
    source = Scripted()
    async with working(source) as worker:
        first = asyncio.create_task(worker.draft(request("a")))
        assert await asyncio.to_thread(source.called.wait, 10)
        ahead = worker.ahead(after("x"))
        others = [asyncio.create_task(worker.draft(request(name))) for name in "bc"]
        await asyncio.sleep(0)
        source.go.set()
        made = await asyncio.gather(first, *others)
        assert [draft.tokens for draft, _ in made] == [[7]] * 3
        assert ahead is not None
        (prepared,), _ = await ahead
        assert (prepared.tokens, prepared.draft) == ([3, 8], Draft([9]))
    assert source.calls == [["a"], ["b", "c"], ["after x"]]


async def test_after_a_failed_call_drafts_are_empty_and_the_source_goes_on() -> None:
    source = Scripted()
    source.go.set()
    async with working(source) as worker:
        source.fails = True
        asked = request("a")
        draft, _ = await worker.draft(asked)
        assert (draft.tokens, asked.round.kept) == ([], 1)
        asked.round.cut(len(draft.tokens))
        assert (asked.round.acceptance, asked.round.kept_tokens, asked.round.wants("model")) == ([], [], False)
        source.fails = False
        assert (await worker.draft(request("a")))[0].tokens == [7]


async def test_cancelled_drafts_ahead_are_dropped() -> None:
    source = Scripted()
    async with working(source) as worker:
        first = asyncio.create_task(worker.draft(request("a")))
        assert await asyncio.to_thread(source.called.wait, 10)
        for _ in range(100):
            answer = worker.ahead(after("x"))
            assert answer is not None
            answer.cancel()
        assert len(worker._aheads.pending) == 1
        worker.close("x")
        source.go.set()
        await first
        await worker.draft(request("b"))
    assert source.calls == [["a"], ["close x"], ["b"]]


@pytest.mark.parametrize("reason", ["cancelled", "a draft is asked for"])
async def test_preparing_stops_when_it_is_no_longer_wanted(reason: str) -> None:
    source = Scripted()
    source.go.set()
    source.waits_until_unwanted = True
    async with working(source) as worker:
        answer = worker.ahead(after("x"))
        assert answer is not None
        assert await asyncio.to_thread(source.preparing.wait, 10)
        if reason == "cancelled":
            answer.cancel()
        assert (await worker.draft(request("a")))[0].tokens == [7]
        if reason != "cancelled":
            assert len((await answer)[0]) == 1, "what is done by then is kept"


def test_only_verified_tokens_are_counted() -> None:
    def counts(tokens: list[int], accepted: int, trimmed_to: int) -> tuple[int, int]:
        return verified_counts(result("s", 1, 3, tokens, accepted=accepted, trimmed_to=trimmed_to))

    assert counts([5, 6, 7], 2, 4) == (4, 2)  # the third was rejected
    assert counts([5, 6, 7], 2, 2) == (2, 2)  # trimming left two tokens, and both are accepted
    assert counts([5, 6], 2, 4) == (2, 2)  # the second ends the text: the tokens behind it were not verified
    assert counts([5, 6], 2, 0) == (0, 0)  # a repeated result of the round
    assert counts([5, 6, 7], 2, 0) == (0, 0)
