"""The contract of the store of sessions: the same cases for the one in Redis and the one in memory.

A test module subclasses `StoreContract` and provides the fixture `store`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import builders
import pytest
from builders import PROMPT

from shared.errors import Fenced
from shared.messages import Finish, Sampling, Slo
from shared.state.commits import Commit, CommitOutcome
from shared.state.sessions import Request, Session, SessionStatus
from shared.state.store import Store


def request(session: str = "s", slo: Slo | None = None) -> Request:
    return builders.stored_request(session, sampling=Sampling(temperature=0.7, seed=-3), slo=slo)


def commit(
    round_: int, base: int, tokens: list[int], *, finish: Finish | None = None, accepted: int = 0, session: str = "s"
) -> Commit:
    return Commit(session, round_, base, accepted, tokens, finish, base + accepted)


async def whole(store: Store) -> Session:
    (session,) = await store.read(["s"])
    assert session is not None
    return session


class StoreContract:
    """Cases for every store."""

    async def test_a_created_session_reads_back_whole(self, store: Store) -> None:
        await store.create(request(), PROMPT, elapsed_ms=50)
        session = await whole(store)
        assert session.request == request()
        assert (session.tokens, session.status, session.round, session.finish) == (
            PROMPT,
            SessionStatus.ACTIVE,
            -1,
            None,
        )
        assert 50 <= session.elapsed_ms < 5000

    async def test_a_round_on_the_committed_length_is_appended(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        (answer,) = await store.commit("v", [commit(0, 3, [8, 9], accepted=1)])
        assert (answer.outcome, answer.length, answer.base_len, answer.accepted) == (CommitOutcome.COMMITTED, 5, 3, 1)
        assert (await whole(store)).tokens == [5, 6, 7, 8, 9]

    async def test_a_repeated_round_returns_its_first_commit(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        (first,) = await store.commit("v", [commit(0, 3, [8, 9], accepted=1)])
        (again,) = await store.commit("w", [commit(0, 3, [8], accepted=0)])
        assert again == first
        assert (await whole(store)).tokens == [5, 6, 7, 8, 9]

    async def test_a_session_records_the_arithmetics_of_its_commits(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        (unknown,) = await store.commit("v", [commit(0, 3, [8])])
        assert unknown.committed_in == (await whole(store)).committed_in == []
        for round_, arithmetic, known in (
            (1, "torch 2.13, cpu AVX2", ["torch 2.13, cpu AVX2"]),
            (2, "torch 2.1", ["torch 2.13, cpu AVX2", "torch 2.1"]),
            (3, "torch 2.13, cpu AVX2", ["torch 2.13, cpu AVX2", "torch 2.1"]),
            (4, "", ["torch 2.13, cpu AVX2", "torch 2.1"]),
        ):
            (answer,) = await store.commit("v", [commit(round_, 3 + round_, [8])], arithmetic=arithmetic)
            assert (answer.outcome, answer.committed_in) == (CommitOutcome.COMMITTED, known)
        progress = await store.progress("s", 3)
        assert progress is not None
        assert progress.committed_in == (await whole(store)).committed_in == known

    @pytest.mark.parametrize(("round_", "base", "tokens"), [(0, 3, [9]), (1, 3, [9]), (1, 4, [])])
    async def test_a_verifier_whose_tokens_are_not_committed_leaves_no_arithmetic(
        self, store: Store, round_: int, base: int, tokens: list[int]
    ) -> None:
        await store.create(request(), PROMPT)
        await store.commit("v", [commit(0, 3, [8])], arithmetic="wisp-1")
        (answer,) = await store.commit("w", [commit(round_, base, tokens)], arithmetic="other")
        assert answer.committed_in == (await whole(store)).committed_in == ["wisp-1"]

    async def test_a_repeated_last_round_returns_the_finish_reason(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        await store.commit("v", [commit(0, 3, [8, 2], finish=Finish.STOP, accepted=1)])
        (again,) = await store.commit("v", [commit(0, 3, [8, 2], finish=Finish.STOP, accepted=1)])
        assert (again.outcome, again.finish, again.tokens) == (CommitOutcome.COMMITTED, Finish.STOP, [8, 2])

    @pytest.mark.parametrize(("round_", "base", "tokens"), [(7, 3, [8, 9]), (1, 4, [9]), (1, 9, [])])
    async def test_a_round_on_another_length_is_a_conflict_that_carries_the_truth(
        self, store: Store, round_: int, base: int, tokens: list[int]
    ) -> None:
        await store.create(request(), PROMPT)
        await store.commit("v", [commit(0, 3, [8, 9])])
        (answer,) = await store.commit("v", [commit(round_, base, [1, 1])])
        assert answer.outcome is CommitOutcome.CONFLICT
        assert answer.length == 5
        assert answer.base_len == min(base, 5)
        assert answer.tokens == tokens
        assert (await whole(store)).tokens == [5, 6, 7, 8, 9]

    async def test_a_commit_without_tokens_only_asks(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        (answer,) = await store.commit("v", [commit(0, 3, [])])
        assert (answer.outcome, answer.length, answer.tokens) == (CommitOutcome.CONFLICT, 3, [])

    async def test_nothing_is_added_after_the_end_or_a_cancel(self, store: Store) -> None:
        await store.create(request("done"), PROMPT)
        await store.create(request("left"), PROMPT)
        await store.commit("v", [commit(0, 3, [2], finish=Finish.STOP, session="done")])
        await store.cancel("left")
        done, left = await store.commit("v", [commit(1, 4, [8], session="done"), commit(0, 3, [8], session="left")])
        assert (done.outcome, done.finish, done.length) == (CommitOutcome.CONFLICT, Finish.STOP, 4)
        assert left.outcome is CommitOutcome.CANCELLED

    async def test_a_creation_that_is_repeated_resets_nothing(self, store: Store) -> None:
        assert await store.create(request(), PROMPT)
        await store.commit("v", [commit(0, 3, [8, 9])])
        assert await store.create(request(), PROMPT)
        assert (await whole(store)).tokens == [*PROMPT, 8, 9]
        await store.cancel("s")
        assert not await store.create(request(), PROMPT)
        assert (await whole(store)).status is SessionStatus.CANCELLED

    async def test_cancelling_a_finished_session_leaves_it_finished(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        await store.commit("v", [commit(0, 3, [2], finish=Finish.STOP)])
        await store.cancel("s")
        assert (await whole(store)).status is SessionStatus.FINISHED

    async def test_one_call_commits_a_batch_and_each_job_by_itself(self, store: Store) -> None:
        for i in range(20):
            await store.create(request(f"s{i}"), PROMPT)
        jobs = [commit(0, 3 if i % 2 else 4, [i], session=f"s{i}") for i in range(20)]
        answers = await store.commit("v", [*jobs, commit(0, 3, [1], session="unknown")])
        assert [a.outcome for a in answers[:20]] == [CommitOutcome.CONFLICT, CommitOutcome.COMMITTED] * 10
        assert answers[20].outcome is CommitOutcome.GONE

    async def test_of_many_verifiers_at_once_exactly_one_commits_a_round(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        answers = await asyncio.gather(*(store.commit(f"v{i}", [commit(i, 3, [i])]) for i in range(20)))
        outcomes = [answer.outcome for (answer,) in answers]
        assert outcomes.count(CommitOutcome.COMMITTED) == 1
        assert outcomes.count(CommitOutcome.CONFLICT) == 19
        assert len((await whole(store)).tokens) == 4

    async def test_progress_gives_the_tokens_from_a_position_on(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        await store.commit("v", [commit(0, 3, [8, 9])])
        progress = await store.progress("s", 4)
        assert progress is not None
        assert (progress.length, progress.tokens, progress.status) == (5, [9], SessionStatus.ACTIVE)
        assert await store.progress("unknown", 0) is None

    async def test_one_verifiers_lease_is_no_others(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        lease = await store.registry.renew("v", 0)
        with pytest.raises(Fenced):
            await store.commit("w", [commit(0, 3, [8])], lease=lease)

    async def test_only_the_gateway_that_collects_a_session_may_cancel_it(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        assert await store.collect("s", "h")
        assert not await store.cancel("s", "g")
        assert (await whole(store)).status is SessionStatus.ACTIVE
        assert await store.cancel("s", "h")
        assert (await whole(store)).status is SessionStatus.CANCELLED
        assert not await store.collect("unknown", "h")

    async def test_a_resume_record_is_read_by_another_gateway(self, store: Store) -> None:
        await store.create(request("s"), PROMPT, resume_record=b"how it is written")
        await store.create(request("plain"), PROMPT)
        assert [await store.resume_record(name) for name in ("s", "plain", "unknown")] == [
            b"how it is written",
            None,
            None,
        ]

    async def test_log_probabilities_are_kept_with_their_tokens_only(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        rounds = [replace(commit(0, 3, [8, 9]), logprobs=b"abcd"), replace(commit(1, 5, [4]), logprobs=b"ef")]
        for one in (rounds[0], rounds[0], replace(commit(5, 3, [7]), logprobs=b"lost"), rounds[1]):
            await store.commit("v", [one])
        progress = await store.progress("s", 4)
        assert progress is not None
        assert (progress.tokens, progress.logprobs) == ([9, 4], b"abcdef")

    async def test_a_session_cancelled_before_its_creation_never_becomes_active(self, store: Store) -> None:
        assert await store.cancel("s", "g")
        assert not await store.create(request(slo=Slo(ttft_ms=1000.0, tpot_ms=100.0)), PROMPT)
        assert await store.ended(["s"]) == ["s"]
        assert (await store.read(["s"]), await store.progress("s", 0), await store.resume_record("s")) == (
            [None],
            None,
            None,
        )
        assert not await store.collect("s", "h")
        (answer,) = await store.commit("v", [commit(0, 3, [8])])
        assert answer.outcome is CommitOutcome.GONE

    async def test_a_left_session_names_its_length_until_it_is_collected(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        assert await store.collect("s", "h")
        await store.leave("s", "g", 3)  # which does not have it any more
        assert (await whole(store)).left_at is None
        await store.leave("s", "h", 4)
        assert (await whole(store)).left_at == 4
        assert not await store.cancel("s", "h"), "nobody collects it"
        assert await store.collect("s", "i")
        assert await store.cancel("s", "i")

    async def test_times_run_from_the_requests_arrival(self, store: Store) -> None:
        await store.create(request(), PROMPT, elapsed_ms=5000.0, pool="phones")
        fresh = await whole(store)
        assert fresh.first_ms is None
        assert fresh.elapsed_ms >= fresh.idle_ms >= 4999  # whole milliseconds are stored
        assert await store.turns() == [], "without a commit"
        await store.commit("v", [commit(0, 3, [8])])
        session, (turn,) = await whole(store), await store.turns()
        assert session.first_ms is not None
        assert session.elapsed_ms >= session.first_ms >= 4999 > session.idle_ms
        assert (turn.session_id, turn.pool) == ("s", "phones")
        assert turn.age_ms >= 4999 > turn.idle_ms
        await store.cancel("s")
        assert await store.turns() == []

    async def test_a_stored_response_is_read_back(self, store: Store) -> None:
        await store.store_response("resp_1", b"body")
        assert [await store.stored_response(name) for name in ("resp_1", "resp_2")] == [b"body", None]

    async def test_the_last_heartbeat_of_each_verifier_is_kept(self, store: Store) -> None:
        for beat in (builders.heartbeat("w"), builders.heartbeat("v"), builders.heartbeat("w", draining=True)):
            await store.registry.beat(beat)
        kept = await store.registry.heartbeats()
        assert [(beat.verifier, beat.draining) for beat in kept] == [("v", False), ("w", True)]

    async def test_a_lease_ends_when_a_new_one_is_given(self, store: Store) -> None:
        await store.create(request(), PROMPT)
        first = await store.registry.renew("v", 0)
        assert first != 0
        assert await store.registry.renew("v", first) == first
        (answer,) = await store.commit("v", [commit(0, 3, [8])], lease=first)
        assert answer.outcome is CommitOutcome.COMMITTED
        second = await store.registry.renew("v", 0)
        assert second != first
        for jobs in ([commit(1, 4, [9])], []):
            with pytest.raises(Fenced):
                await store.commit("v", jobs, lease=first)
        assert (await whole(store)).tokens == [5, 6, 7, 8]
        (answer,) = await store.commit("v", [commit(1, 4, [9])], lease=second)
        assert answer.outcome is CommitOutcome.COMMITTED
