"""The session store and the commit script, on a real Redis: its contract, and keys, deadlines and expiry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import builders
import pytest
from builders import PROMPT
from redis.asyncio import Redis
from store_contract import StoreContract, commit, request

from shared.errors import BrokersError, Fenced
from shared.messages import SILENT_MS, Finish, Slo
from shared.state.commits import CommitOutcome
from shared.state.store import Store


@pytest.fixture
async def store(redis_url: str, namespace: str) -> AsyncIterator[Store]:
    store = Store.connect(redis_url, namespace, ttl_s=60)
    yield store
    await store.close()


class TestRedisStore(StoreContract):
    """The contract's cases, over `store`."""


async def test_stored_state_expires(store: Store, redis_url: str, namespace: str) -> None:
    await store.create(request(), PROMPT)
    await store.commit("v", [replace(commit(0, 3, [8]), logprobs=b"abcd")])
    await store.create(request("plain"), PROMPT)
    await store.commit("v", [commit(0, 3, [8], session="plain")])
    await store.store_response("resp_1", b"body")
    await store.registry.renew("v", 0)
    async with Redis.from_url(redis_url) as redis:
        for name in ("session:s", "tokens:s", "logprobs:s", "response:resp_1"):
            assert 0 < await redis.ttl(f"{namespace}:{name}") <= 60, name
        assert 0 < await redis.pttl(f"{namespace}:lease:v") <= SILENT_MS
        assert await redis.exists(f"{namespace}:logprobs:plain") == 0


async def test_the_mark_of_a_cancelled_session_has_no_deadline(store: Store, redis_url: str, namespace: str) -> None:
    await store.cancel("s", "g")
    await store.create(request(slo=Slo(ttft_ms=1000.0, tpot_ms=100.0)), PROMPT)
    assert await store.deadline_ms("s") is None
    async with Redis.from_url(redis_url) as redis:
        assert await redis.zcard(f"{namespace}:deadlines") == 0
        assert 0 < await redis.ttl(f"{namespace}:session:s") <= 300


async def test_a_lease_that_expired_is_replaced(store: Store, redis_url: str, namespace: str) -> None:
    first = await store.registry.renew("v", 0)
    async with Redis.from_url(redis_url) as redis:
        await redis.delete(f"{namespace}:lease:v")
    with pytest.raises(Fenced):
        await store.commit("v", [], lease=first)
    assert await store.registry.renew("v", first) != first


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
