"""The usage of keys, counted by the script in a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from shared.state import quota
from shared.state.quota import Allowance, Limited, Quota
from shared.state.store import Store


@pytest.fixture
async def counters(redis_url: str, namespace: str) -> AsyncIterator[Quota]:
    store = Store.connect(redis_url, namespace, 60)
    yield store.quota
    await store.close()


async def test_requests_are_granted_up_to_the_limit_whoever_asks(
    counters: Quota, redis_url: str, namespace: str
) -> None:
    others = [Store.connect(redis_url, namespace, 60) for _ in range(3)]
    allowance = Allowance(requests_per_minute=10)
    asked = [each.quota.take("k", allowance, 5, [f"s{i}{j}"]) for i, each in enumerate(others) for j in range(8)]
    verdicts = await asyncio.gather(*asked)
    assert sum(verdict.refused is None for verdict in verdicts) == 10
    refused = next(verdict for verdict in verdicts if verdict.refused)
    assert refused.refused is Limited.REQUESTS
    assert 0 < refused.wait_ms <= 6000
    assert (await counters.take("another", allowance, 5, ["s"])).refused is None
    for store in others:
        await store.close()


async def test_a_refusal_names_the_time_to_retry(counters: Quota) -> None:
    allowance = Allowance(requests_per_minute=60, tokens_per_minute=60_000)
    first = await counters.take("k", allowance, 60_000, ["a"])
    assert (first.refused, first.requests_left, first.tokens_left) == (None, 59, 0)
    assert 0 < first.requests_reset_ms <= 1000
    assert 59_000 < first.tokens_reset_ms <= 60_000
    early = await counters.take("k", allowance, 30_000, ["b"])
    assert early.refused is Limited.TOKENS
    assert 0 < early.wait_ms <= 30_000
    left = 30_000 - early.wait_ms
    await asyncio.sleep(0.3)
    assert (await counters.take("k", allowance, left + 299, ["b"])).refused is None, "a token a millisecond"


async def test_unused_tokens_are_given_back_and_excess_is_worked_off(counters: Quota) -> None:
    allowance, started = Allowance(tokens_per_minute=6000), time.monotonic()

    def grown() -> float:
        """The most tokens that have come back since the start."""
        return (time.monotonic() - started) * 6000 / 60 + 1

    await counters.take("k", allowance, 5000, ["a"])
    await counters.settle("k", allowance, 4000, ["a"])
    assert 4999 <= (await counters.take("k", allowance, 1, ["b"])).tokens_left < 4999 + grown()
    await counters.settle("k", allowance, -9000, ["b"])
    debtor = await counters.take("k", allowance, 1, ["c"])
    assert debtor.refused is Limited.TOKENS
    assert -4002 <= debtor.tokens_left < -4001 + grown()
    assert 40_000 - 10 * grown() < debtor.wait_ms <= 40_020
    await counters.settle("k", allowance, 10**9, ["b"])
    assert (await counters.take("k", allowance, 6000, ["c"])).refused is None


async def test_a_request_that_a_minute_cannot_hold_is_refused_for_good(counters: Quota) -> None:
    verdict = await counters.take("k", Allowance(tokens_per_minute=100), 101, ["a"])
    assert verdict.refused is Limited.SIZE
    assert verdict.tokens_left == 100


async def test_sessions_count_until_they_end_or_their_gateway_dies(
    counters: Quota, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "LEASE_MS", 1500)
    allowance = Allowance(max_sessions=3)
    assert (await counters.take("k", allowance, 9, ["a", "b"])).refused is None
    assert (await counters.take("k", allowance, 9, ["c", "d"])).refused is Limited.SESSIONS
    await counters.settle("k", allowance, 0, ["b"])
    assert (await counters.take("k", allowance, 9, ["c", "d"])).refused is None
    for _ in range(16):  # a and c are looked after, d is not
        await asyncio.sleep(0.1)
        await counters.renew({"k": ["a", "c"]})
    assert (await counters.take("k", allowance, 9, ["e", "f"])).refused is Limited.SESSIONS
    assert (await counters.take("k", allowance, 9, ["e"])).refused is None


async def test_a_resumed_request_counts_as_no_other_request(counters: Quota) -> None:
    allowance = Allowance(requests_per_minute=1, tokens_per_minute=1000, max_sessions=2)
    assert (await counters.take("k", allowance, 1000, ["a", "b"])).refused is None
    again = await counters.join("k", allowance, ["a", "b"])
    assert (again.refused, again.requests_left) == (None, 0)
    assert (await counters.join("k", allowance, ["a", "c"])).refused is Limited.SESSIONS
    await counters.settle("k", allowance, -500, ["a", "b"])
    assert (await counters.join("k", allowance, ["c"])).tokens_left < -400


async def test_a_limit_that_is_set_later_begins_full(counters: Quota) -> None:
    await counters.take("k", Allowance(requests_per_minute=5), 1000, ["a"])
    assert (await counters.take("k", Allowance(5, tokens_per_minute=1000), 1000, ["b"])).refused is None


async def test_nothing_stays_in_redis_for_ever(counters: Quota, redis_url: str, namespace: str) -> None:
    await counters.take("k", Allowance(5, 1000, 3), 1000, ["a"])
    async with Redis.from_url(redis_url) as redis:
        keys = [key async for key in redis.scan_iter(f"{namespace}:*")]
        assert len(keys) == 2
        assert all([0 < await redis.pttl(key) <= 61_000 for key in keys])
