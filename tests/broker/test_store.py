"""The session store and the commit script, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import builders
import pytest
from builders import PROMPT
from redis.asyncio import Redis

from shared.errors import BrokersError, Fenced
from shared.messages import SILENT_MS, Finish, Sampling, Slo
from shared.state.commits import Commit, CommitOutcome
from shared.state.sessions import Request, Session, SessionStatus
from shared.state.store import Store


@pytest.fixture
async def store(redis_url: str, namespace: str) -> AsyncIterator[Store]:
    store = Store.connect(redis_url, namespace, ttl_s=60)
    yield store
    await store.close()


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


async def test_a_created_session_reads_back_whole(store: Store) -> None:
    await store.create(request(), PROMPT, elapsed_ms=50)
    session = await whole(store)
    assert session.request == request()
    assert (session.tokens, session.status, session.round, session.finish) == (PROMPT, SessionStatus.ACTIVE, -1, None)
    assert 50 <= session.elapsed_ms < 5000


async def test_a_round_on_the_committed_length_is_appended(store: Store) -> None:
    await store.create(request(), PROMPT)
    (answer,) = await store.commit("v", [commit(0, 3, [8, 9], accepted=1)])
    assert (answer.outcome, answer.length, answer.base_len, answer.accepted) == (CommitOutcome.COMMITTED, 5, 3, 1)
    assert (await whole(store)).tokens == [5, 6, 7, 8, 9]


async def test_a_repeated_round_returns_its_first_commit(store: Store) -> None:
    await store.create(request(), PROMPT)
    (first,) = await store.commit("v", [commit(0, 3, [8, 9], accepted=1)])
    (again,) = await store.commit("w", [commit(0, 3, [8], accepted=0)])
    assert again == first
    assert (await whole(store)).tokens == [5, 6, 7, 8, 9]


async def test_a_session_records_the_arithmetics_of_its_commits(store: Store) -> None:
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


async def test_log_probabilities_are_kept_with_their_tokens_only(store: Store, redis_url: str, namespace: str) -> None:
    await store.create(request(), PROMPT)
    rounds = [replace(commit(0, 3, [8, 9]), logprobs=b"abcd"), replace(commit(1, 5, [4]), logprobs=b"ef")]
    for one in (rounds[0], rounds[0], replace(commit(5, 3, [7]), logprobs=b"lost"), rounds[1]):
        await store.commit("v", [one])
    progress = await store.progress("s", 4)
    assert progress is not None
    assert (progress.tokens, progress.logprobs) == ([9, 4], b"abcdef")
    redis: Redis = Redis.from_url(redis_url)
    assert 0 < await redis.ttl(f"{namespace}:logprobs:s") <= 60
    await store.create(request("plain"), PROMPT)
    await store.commit("v", [commit(0, 3, [8], session="plain")])
    assert await redis.exists(f"{namespace}:logprobs:plain") == 0
    await redis.aclose()


async def test_a_response_is_kept_for_a_while(store: Store, redis_url: str, namespace: str) -> None:
    await store.store_response("resp_1", b"body")
    assert await store.stored_response("resp_1") == b"body"
    assert await store.stored_response("resp_2") is None
    redis: Redis = Redis.from_url(redis_url)
    assert 0 < await redis.ttl(f"{namespace}:response:resp_1") <= 60
    await redis.aclose()


@pytest.mark.parametrize(("round_", "base", "tokens"), [(0, 3, [9]), (1, 3, [9]), (1, 4, [])])
async def test_a_verifier_whose_tokens_are_not_committed_leaves_no_arithmetic(
    store: Store, round_: int, base: int, tokens: list[int]
) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [8])], arithmetic="wisp-1")
    (answer,) = await store.commit("w", [commit(round_, base, tokens)], arithmetic="other")
    assert answer.committed_in == (await whole(store)).committed_in == ["wisp-1"]


async def test_a_repeated_last_round_returns_the_finish_reason(store: Store) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [8, 2], finish=Finish.STOP, accepted=1)])
    (again,) = await store.commit("v", [commit(0, 3, [8, 2], finish=Finish.STOP, accepted=1)])
    assert (again.outcome, again.finish, again.tokens) == (CommitOutcome.COMMITTED, Finish.STOP, [8, 2])


@pytest.mark.parametrize(("round_", "base", "tokens"), [(7, 3, [8, 9]), (1, 4, [9]), (1, 9, [])])
async def test_a_round_on_another_length_is_a_conflict_that_carries_the_truth(
    store: Store, round_: int, base: int, tokens: list[int]
) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [8, 9])])
    (answer,) = await store.commit("v", [commit(round_, base, [1, 1])])
    assert answer.outcome is CommitOutcome.CONFLICT
    assert answer.length == 5
    assert answer.base_len == min(base, 5)
    assert answer.tokens == tokens
    assert (await whole(store)).tokens == [5, 6, 7, 8, 9]


async def test_a_commit_without_tokens_only_asks(store: Store) -> None:
    await store.create(request(), PROMPT)
    (answer,) = await store.commit("v", [commit(0, 3, [])])
    assert (answer.outcome, answer.length, answer.tokens) == (CommitOutcome.CONFLICT, 3, [])


async def test_nothing_is_added_after_the_end_or_a_cancel(store: Store) -> None:
    await store.create(request("done"), PROMPT)
    await store.create(request("left"), PROMPT)
    await store.commit("v", [commit(0, 3, [2], finish=Finish.STOP, session="done")])
    await store.cancel("left")
    done, left = await store.commit("v", [commit(1, 4, [8], session="done"), commit(0, 3, [8], session="left")])
    assert (done.outcome, done.finish, done.length) == (CommitOutcome.CONFLICT, Finish.STOP, 4)
    assert left.outcome is CommitOutcome.CANCELLED


async def test_a_session_cancelled_before_its_creation_never_becomes_active(
    store: Store, redis_url: str, namespace: str
) -> None:
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
    assert await store.deadline_ms("s") is None
    async with Redis.from_url(redis_url) as redis:
        assert await redis.zcard(f"{namespace}:deadlines") == 0
        assert 0 < await redis.ttl(f"{namespace}:session:s") <= 300


async def test_a_creation_that_is_repeated_resets_nothing(store: Store) -> None:
    assert await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [8, 9])])
    assert await store.create(request(), PROMPT)
    assert (await whole(store)).tokens == [*PROMPT, 8, 9]
    await store.cancel("s")
    assert not await store.create(request(), PROMPT)
    assert (await whole(store)).status is SessionStatus.CANCELLED


async def test_cancelling_a_finished_session_leaves_it_finished(store: Store) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [2], finish=Finish.STOP)])
    await store.cancel("s")
    assert (await whole(store)).status is SessionStatus.FINISHED


async def test_one_call_commits_a_batch_and_each_job_by_itself(store: Store) -> None:
    for i in range(20):
        await store.create(request(f"s{i}"), PROMPT)
    jobs = [commit(0, 3 if i % 2 else 4, [i], session=f"s{i}") for i in range(20)]
    answers = await store.commit("v", [*jobs, commit(0, 3, [1], session="unknown")])
    assert [a.outcome for a in answers[:20]] == [CommitOutcome.CONFLICT, CommitOutcome.COMMITTED] * 10
    assert answers[20].outcome is CommitOutcome.GONE


async def test_of_many_verifiers_at_once_exactly_one_commits_a_round(store: Store) -> None:
    await store.create(request(), PROMPT)
    answers = await asyncio.gather(*(store.commit(f"v{i}", [commit(i, 3, [i])]) for i in range(20)))
    outcomes = [answer.outcome for (answer,) in answers]
    assert outcomes.count(CommitOutcome.COMMITTED) == 1
    assert outcomes.count(CommitOutcome.CONFLICT) == 19
    assert len((await whole(store)).tokens) == 4


async def test_half_lost_state_counts_as_gone(store: Store, redis_url: str, namespace: str) -> None:
    await store.create(request(), PROMPT)
    async with Redis.from_url(redis_url) as redis:
        await redis.delete(f"{namespace}:tokens:s")
    (answer,) = await store.commit("v", [commit(0, 3, [8])])
    assert answer.outcome is CommitOutcome.GONE
    assert await store.read(["s"]) == [None]


async def test_deadlines_follow_the_slo(store: Store) -> None:
    await store.create(request(slo=Slo(ttft_ms=1000.0, tpot_ms=100.0)), PROMPT)
    due = [await store.deadline_ms("s")]
    await store.commit("v", [commit(0, 3, [8, 9])])
    due.append(await store.deadline_ms("s"))
    (session,) = await store.read(["s"])
    assert session is not None
    await store.commit("v", [commit(1, 5, [4])])
    due.append(await store.deadline_ms("s"))
    first, second, third = (at for at in due if at is not None)
    assert session.first_ms is not None
    assert second == pytest.approx(first - 1000 + session.first_ms + 200, abs=2), "counted from the first token on"
    assert third == pytest.approx(second + 100, abs=1)
    await store.commit("v", [commit(2, 6, [2], finish=Finish.STOP)])
    assert await store.deadline_ms("s") is None


async def test_progress_gives_the_tokens_from_a_position_on(store: Store) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [8, 9])])
    progress = await store.progress("s", 4)
    assert progress is not None
    assert (progress.length, progress.tokens, progress.status) == (5, [9], SessionStatus.ACTIVE)
    assert await store.progress("unknown", 0) is None


async def test_session_state_expires(store: Store, redis_url: str, namespace: str) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [commit(0, 3, [8])])
    async with Redis.from_url(redis_url) as redis:
        assert 0 < await redis.ttl(f"{namespace}:session:s") <= 60
        assert 0 < await redis.ttl(f"{namespace}:tokens:s") <= 60


async def test_heartbeats_and_cost_models_are_kept(store: Store) -> None:
    beat, model = builders.heartbeat(), builders.cost_model()
    await store.registry.beat(beat)
    await store.registry.save_cost_model(model)
    assert await store.registry.heartbeats() == [beat]
    assert await store.registry.cost_models() == [model]
    await store.registry.remove("v1")
    assert await store.registry.heartbeats() == []


async def test_a_single_redis_and_an_unreachable_one_are_not_refused(store: Store, namespace: str) -> None:
    await store.refuse_cluster()
    away = Store.connect("redis://127.0.0.1:1/0", namespace)
    await away.refuse_cluster()
    await away.close()


async def test_an_unreachable_redis_is_a_clear_error(namespace: str) -> None:
    store = Store.connect("redis://127.0.0.1:1/0", namespace, ttl_s=60)
    with pytest.raises(BrokersError, match="WISP_REDIS_URL"):
        await store.ping()
    await store.close()


async def test_a_lease_lasts_as_long_as_it_is_renewed(store: Store, redis_url: str, namespace: str) -> None:
    await store.create(request(), PROMPT)
    first = await store.registry.renew("v", 0)
    assert await store.registry.renew("v", first) == first
    (answer,) = await store.commit("v", [commit(0, 3, [8])], lease=first)
    assert answer.outcome is CommitOutcome.COMMITTED
    async with Redis.from_url(redis_url) as redis:
        assert 0 < await redis.pttl(f"{namespace}:lease:v") <= SILENT_MS
        await redis.delete(f"{namespace}:lease:v")
    with pytest.raises(Fenced):
        await store.commit("v", [commit(1, 4, [9])], lease=first)
    second = await store.registry.renew("v", first)
    assert second != first
    for jobs in ([commit(1, 4, [9])], []):
        with pytest.raises(Fenced):
            await store.commit("v", jobs, lease=first)
    assert (await whole(store)).tokens == [5, 6, 7, 8]
    (answer,) = await store.commit("v", [commit(1, 4, [9])], lease=second)
    assert answer.outcome is CommitOutcome.COMMITTED


async def test_one_verifiers_lease_is_no_others(store: Store) -> None:
    await store.create(request(), PROMPT)
    lease = await store.registry.renew("v", 0)
    with pytest.raises(Fenced):
        await store.commit("w", [commit(0, 3, [8])], lease=lease)


async def test_a_session_that_no_gateway_collects_is_cancelled_in_the_end(store: Store) -> None:
    await store.create(request("alone"), PROMPT, patience_ms=50)
    await store.create(request("left"), PROMPT, patience_ms=50)
    await store.create(request("collected"), PROMPT, patience_ms=50)
    await store.create(request("endless"), PROMPT)
    assert await store.collect("collected", "h")
    await store.leave("collected", "g", 4)  # which does not have it any more
    for gateway in ("h", "i"):
        await store.registry.attend(gateway)
    assert await store.collect("left", "i")
    await store.leave("left", "i", 4)
    names = ("alone", "left", "collected", "endless")
    first = await store.commit("v", [commit(0, 3, [8], session=name) for name in names])
    assert {answer.outcome for answer in first} == {CommitOutcome.COMMITTED}
    await asyncio.sleep(0.1)
    second = await store.commit("v", [commit(1, 4, [8], session=name) for name in names])
    assert [answer.outcome for answer in second] == [CommitOutcome.CANCELLED] * 2 + [CommitOutcome.COMMITTED] * 2
    assert await store.ended([*names, "unknown"]) == ["alone", "left", "unknown"]


async def test_sessions_without_a_gateway_are_reaped(store: Store) -> None:
    slo = Slo(ttft_ms=100.0, tpot_ms=10.0)
    await store.create(request("alone"), PROMPT, patience_ms=50)
    await store.create(request("collected", slo=slo), PROMPT, patience_ms=50)
    await store.create(request("expired", slo=slo), PROMPT)
    assert await store.deadline_ms("alone") is None
    await store.collect("collected", "h")
    await store.registry.attend("h")
    await store._redis.delete(store._session("expired"))
    assert await store.reap() == ["expired"]
    await asyncio.sleep(0.1)
    assert await store.reap() == ["alone"]
    assert await store.reap() == []
    assert [name for name, _ in await store._redis.zrange(store._deadlines, 0, -1, withscores=True)] == [b"collected"]
    (answer,) = await store.commit("v", [commit(0, 3, [8], session="alone")])
    assert answer.outcome is CommitOutcome.CANCELLED
    (answer,) = await store.commit("v", [commit(0, 3, [8], session="collected")])
    assert (answer.outcome, answer.tokens) == (CommitOutcome.COMMITTED, [8])


async def test_a_gateway_that_comes_back_in_time_keeps_its_sessions(store: Store) -> None:
    await store.create(request(), PROMPT, patience_ms=50)
    await store.commit("v", [commit(0, 3, [8])])
    await store.registry.attend("g")
    await store.commit("v", [commit(1, 4, [8])])
    await asyncio.sleep(0.1)
    (answer,) = await store.commit("v", [commit(2, 5, [8])])
    assert answer.outcome is CommitOutcome.COMMITTED


async def test_only_the_gateway_that_collects_a_session_may_cancel_it(store: Store) -> None:
    await store.create(request(), PROMPT)
    assert await store.collect("s", "h")
    assert not await store.cancel("s", "g")
    assert (await whole(store)).status is SessionStatus.ACTIVE
    assert await store.cancel("s", "h")
    assert (await whole(store)).status is SessionStatus.CANCELLED
    assert not await store.collect("unknown", "h")


async def test_a_resume_record_is_read_by_another_gateway(store: Store) -> None:
    await store.create(request("s"), PROMPT, resume_record=b"how it is written")
    await store.create(request("plain"), PROMPT)
    assert [await store.resume_record(name) for name in ("s", "plain", "unknown")] == [b"how it is written", None, None]
