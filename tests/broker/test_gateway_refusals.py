"""Refusals, service classes and pools over RabbitMQ and Redis, through the official client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from gateway_peer import Script, eventually
from gateway_suite import MODEL, Start, Suite

from shared.broker import topology
from shared.messages import DEFAULT_CLASS, Load, Slo
from shared.state.sessions import SessionStatus


@pytest.fixture
async def suite(shared: Suite) -> AsyncIterator[Suite]:
    """The gateway that the tests of this module share, without the load of an earlier test."""
    await shared.peer.reset()
    yield shared
    await send_load(shared, utilization=0.0)


async def send_load(suite: Suite, **fields: Any) -> None:
    """Send the Load of a fleet of one verifier, and wait until the gateway has received it."""
    told = {"scheduler": "s", "price_ms": 0.0, "queue_ms": 0.0, "pending": 0, "draft_cap": 8, "verifiers": 1}
    others = {"service_class": DEFAULT_CLASS, "sessions": 9, "waiting": 0, "queue_ms": 0.0}
    message = Load.model_validate(told | {"round_ms": 1.0, "classes": [others]} | fields)
    await suite.peer.broker.publish(message, topology.LOAD, confirmed=True)
    # The probe of /ready passes through the gateway's own queue, behind the Load.
    assert (await suite.http.get("/ready")).status_code == 200


async def test_classes_are_refused_in_order_with_reason_and_retry_time(suite: Suite) -> None:
    for utilization, takes in ((0.7, 3), (0.85, 2), (0.95, 1), (1.05, 0)):
        await send_load(suite, utilization=utilization)
        taken = []
        for tier in ("flex", "default", "priority"):
            asking = suite.chat(service_tier=tier, extra_headers={"x-slo-ttft-ms": "60000"})
            (outcome,) = await asyncio.gather(asking, return_exceptions=True)
            if not isinstance(outcome, openai.RateLimitError):
                taken.append(outcome.service_tier)
                continue
            assert outcome.type == "rate_limit_error"
            assert outcome.code == "slo_unattainable_now"
            assert outcome.response.headers["x-wisp-refused"] == outcome.code
            assert outcome.response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
            assert 1 <= int(outcome.response.headers["retry-after"]) <= 60
        assert taken == ["flex", "default", "priority"][3 - takes :]
    assert await suite.metric("wisp_requests_refused_total") == 6


async def test_tier_and_slo_headers_reach_drafter_and_observers(suite: Suite) -> None:
    headers = {"x-llm-d-slo-ttft-ms": "30000", "x-llm-d-slo-tpot-ms": "700"}
    answer = await suite.chat(service_tier="priority", extra_headers=headers, extra_body={"wisp": {"trace": True}})
    generate = suite.peer.generated[0]
    assert (generate.service_class, generate.slo) == ("priority", Slo(ttft_ms=30000, tpot_ms=700))
    assert answer.wisp["summary"]["attained"] is True
    await suite.chat()
    assert suite.peer.generated[1].service_class == DEFAULT_CLASS
    await send_load(suite, utilization=0.99)
    with pytest.raises(openai.RateLimitError):
        await suite.chat(service_tier="flex", n=2, extra_headers=headers)
    await eventually(lambda: len(suite.peer.ended) == 4)
    first = suite.peer.ended[0]
    assert (first.session, first.service_class, first.slo) == (generate.session, "priority", generate.slo)
    assert (first.reason, first.tokens, first.attained) == ("stop", len(suite.peer.script.text), True)
    assert [(one.reason, one.attained) for one in suite.peer.ended[2:]] == [("refused", False)] * 2


async def test_a_burst_of_clients_that_ask_for_nothing_is_served(suite: Suite) -> None:
    refused = await suite.metric("wisp_requests_refused_total")
    await send_load(suite, utilization=3.0, backlog_ms=60_000.0, prefill_ms=50.0, round_ms=900.0)
    answers = await asyncio.gather(*(suite.chat(max_tokens=8) for _ in range(50)))
    assert {answer.choices[0].message.content for answer in answers} == {suite.peer.script.text[:8]}
    assert {generate.slo for generate in suite.peer.generated} == {None}
    assert await suite.metric("wisp_requests_refused_total") == refused


async def test_the_official_client_retries_when_asked(start: Start) -> None:
    async with start(max_sessions=1) as suite:
        await suite.chat()
        suite.peer.script = Script(text="x" * 40, pause_s=0.05)
        first = asyncio.create_task(suite.chat())
        await eventually(lambda: len(suite.peer.generated) == 2)
        patient = suite.client.with_options(max_retries=5)
        answer = await patient.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
        assert answer.choices[0].message.content == "x" * 40
        assert (await first).choices[0].message.content == "x" * 40
        assert await suite.metric("wisp_requests_refused_total") >= 1
        assert len(suite.peer.generated) == 3


async def test_a_burst_between_two_loads_is_limited(suite: Suite) -> None:
    suite.peer.script = Script(text="", ends=False)
    await send_load(suite, utilization=0.5, round_ms=20.0)
    asking = [asyncio.create_task(suite.chat(extra_headers={"x-slo-ttft-ms": "60000"})) for _ in range(12)]
    await eventually(lambda: sum(one.done() for one in asking) == 8)
    for one in asking:
        one.cancel()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(one, openai.RateLimitError) for one in results) == 8  # 0.5 + 4 x 20 / 200 is the whole share
    await eventually(lambda: len(suite.peer.cancelled) == 4)
    await send_load(suite, utilization=0.5, round_ms=20.0)
    suite.peer.script = Script()
    assert (await suite.chat()).choices[0].message.content == suite.peer.script.text


async def test_a_pool_is_served_only_by_its_drafters(suite: Suite) -> None:
    with pytest.raises(openai.InternalServerError, match="pool 'phones'") as caught:
        await suite.chat(extra_body={"wisp": {"pool": "phones"}})
    assert (caught.value.status_code, caught.value.code) == (503, "no_drafter")
    seen: list[str] = []

    async def phone(message: Any) -> None:
        seen.append(message.session)
        await suite.peer._generate(message)

    await suite.peer.broker.consume(suite.peer.broker.topology.generate_queue("phones"), phone, prefetch=4)
    answer = await suite.chat(extra_headers={"x-wisp-pool": "phones"})
    assert answer.choices[0].message.content == suite.peer.script.text
    await suite.chat()
    assert seen == [suite.peer.generated[0].session]


async def test_a_pool_without_drafters_times_out_and_leaves_no_work(start: Start, namespace: str) -> None:
    async with start(stall_timeout_s=0.5) as suite:
        queue = suite.peer.broker.topology.generate_queue("phones")
        channel = await suite.peer.broker._connection.channel()
        left = await channel.declare_queue(queue.name, durable=True, arguments=queue.arguments)
        await left.bind(namespace, queue.bindings[0])
        with pytest.raises(openai.APIStatusError, match="pool 'phones'") as caught:
            await suite.chat(extra_body={"wisp": {"pool": "phones"}})
        assert caught.value.status_code == 504
        await eventually(lambda: len(suite.peer.cancelled) == 1)
        (stored,) = await suite.peer.store.read(suite.peer.cancelled)
        assert stored is not None
        assert stored.status is SessionStatus.CANCELLED
