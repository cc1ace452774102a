"""The whole suite: API, deadlines, prefill in chunks, dead letters, refusals, and KV that is released."""

from __future__ import annotations

import asyncio
import time

import aio_pika
import builders
import openai
import pytest
from asking import TOKENS, Case, Client, Traffic
from patience import HANG_S
from redis.asyncio import Redis

from services.tools.local.stack import Stack
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.messages import Message, Result, Status
from shared.state.store import Store

MESSAGES = [{"role": "user", "content": "Count from one to twenty in words."}]


async def test_the_openai_client_gets_the_same_answer_streamed_and_whole(stack: Stack) -> None:
    client = openai.AsyncOpenAI(base_url=stack.url, api_key="none")
    options = {"model": stack.target.name, "messages": MESSAGES, "max_tokens": 20, "temperature": 0.0, "seed": 1}
    whole = await client.chat.completions.create(**options)
    text, usage, finish = "", None, None
    async for chunk in await client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason == "length"
    assert usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert [model.id async for model in client.models.list()] == [stack.target.name]


async def test_a_stop_string_cuts_the_text_and_ends_the_session(stack: Stack, client: Client) -> None:
    body = {"model": stack.target.name, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = (await client.http.post(f"{stack.url}/chat/completions", json=body)).json()["choices"][0]
    text = whole["message"]["content"]
    stop = text[20:27]
    answer = (await client.http.post(f"{stack.url}/chat/completions", json={**body, "stop": stop})).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(stop)]
    async with Redis.from_url(stack.brokers.redis_url) as redis, asyncio.timeout(HANG_S):
        (key,) = [key async for key in redis.scan_iter(match=f"{stack.namespace}:session:{answer['id']}*")]
        while await redis.hget(key, "status") != b"cancelled":  # noqa: ASYNC110 - Redis does not call back
            await asyncio.sleep(0.05)


async def test_a_request_with_an_slo_has_its_deadline_in_redis_while_it_runs(stack: Stack, client: Client) -> None:
    store = Store.connect(stack.brokers.redis_url, stack.namespace, 60)
    body = {"model": stack.target.name, "messages": MESSAGES, "max_tokens": 40, "stream": True}
    headers = {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "1000"}
    async with client.http.stream("POST", f"{stack.url}/chat/completions", json=body, headers=headers) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        session = first.removeprefix("id: ").split("/")[0]
        async with Redis.from_url(stack.brokers.redis_url) as redis:
            names = [name.decode() for name in await redis.zrange(f"{stack.namespace}:deadlines", 0, -1)]
        mine = [name for name in names if name.startswith(session)]
        assert len(mine) == 1
        due_ms = await store.deadline_ms(mine[0])
        assert due_ms is not None
        assert 0 < due_ms - time.time() * 1000 < 60_000 + 41 * 1000
        async for _ in lines:
            pass
    assert await store.deadline_ms(mine[0]) is None
    await store.close()


async def test_a_long_prompt_in_chunks_beside_short_ones(
    stack: Stack, client: Client, cases: list[Case], traffic: Traffic
) -> None:
    long = Case((cases[0].prompt * 80)[:2600], cases[0].sampling, [])
    traffic.clear()
    # Asked for the first time here: a verifier that had its KV would compute no chunks.
    # The others are promised a speed, which a whole prompt in one batch would break.
    slo = {"x-slo-ttft-ms": "1500", "x-slo-tpot-ms": "300"}
    asked = asyncio.create_task(client.ask(long, "lookup"))
    others: list[list[int]] = []
    while not others or not asked.done():
        # Their answers are short: on a fast machine one set of them may be over after the first chunk.
        others += await asyncio.gather(*(client.ask(case, "lookup", slo) for case in cases[:6]))
    answer = await asked
    parts = [one for one in traffic.results if one.status is Status.PREFILLED and one.base_len == len(long.prompt)]
    assert parts, "the long prompt was computed in one batch"
    assert others == [case.tokens for case in cases[:6]] * (len(others) // 6)
    assert answer == await client.ask(long, "none")


async def test_rubbish_on_every_queue_is_dead_lettered_and_service_goes_on(
    stack: Stack, client: Client, cases: list[Case]
) -> None:
    names = [process.name for process in stack.processes()]
    keys = [topology.VERIFY, topology.SAMPLE, topology.LOAD, topology.CANCEL, topology.generate()]
    keys += [topology.RESULT_SCHEDULER, topology.heartbeat("x"), topology.costmodel("x")]
    keys += [topology.result(name) for name in names if name.startswith(("drafter", "gateway"))]
    keys += [topology.batch(name) for name in names if name.startswith("verifier")]
    async with await aio_pika.connect(stack.brokers.amqp_url) as connection:
        channel = await connection.channel(on_return_raises=True)
        dead = await channel.get_queue(f"{stack.namespace}.dead")
        await dead.purge()
        exchange = await channel.get_exchange(stack.namespace)
        for key in keys:
            await exchange.publish(aio_pika.Message(b"rubbish for " + key.encode()), key)
        found: dict[str, str] = {}
        async with asyncio.timeout(HANG_S), dead.iterator(no_ack=True) as letters:
            async for letter in letters:
                found[letter.body.decode().removeprefix("rubbish for ")] = str(letter.headers["x-wisp-reason"])
                if len(found) == len(keys):
                    break
    assert set(found) == set(keys)
    assert all("not msgpack" in reason or "expected a msgpack map" in reason for reason in found.values())
    assert await client.ask_all(cases[:4]) == [case.tokens for case in cases[:4]]


async def test_a_verifier_refuses_a_session_of_another_model(stack: Stack) -> None:
    broker = await Broker.connect(stack.brokers.amqp_url, Topology(stack.namespace), "stranger")
    answers: asyncio.Queue[Message] = asyncio.Queue()
    await broker.consume(broker.topology.own_queue("test", "stranger", (topology.result("stranger"),)), answers.put)
    job = builders.job(drafter="stranger", gateway="stranger", fingerprint="another model")
    verifier = stack.processes("verifier")[0].name
    await broker.publish(builders.batch("b1", job), topology.batch(verifier))
    answer = await asyncio.wait_for(answers.get(), HANG_S)
    await broker.close()
    assert isinstance(answer, Result)
    assert answer.status is Status.FAILED
    assert answer.error is not None
    assert answer.error.code == "wrong_model"
    assert "another model" in answer.error.message


@pytest.mark.parametrize("extra", [1, 100_000])
async def test_a_prompt_longer_than_a_verifier_can_hold_is_refused(stack: Stack, client: Client, extra: int) -> None:
    holds = 4096
    body = {"model": stack.target.name, "prompt": [5] * (holds + extra), "max_tokens": TOKENS}
    answer = await client.http.post(f"{stack.url}/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_ended_sessions_leave_no_kv_behind(stack: Stack, client: Client, cases: list[Case]) -> None:
    await client.ask_all(cases[:8])
    store = Store.connect(stack.brokers.redis_url, stack.namespace, 60)
    try:
        async with asyncio.timeout(HANG_S):
            while True:
                beats = await store.registry.heartbeats()
                if beats and all(not beat.residency and beat.free_tokens == beat.total_tokens for beat in beats):
                    break
                await asyncio.sleep(0.2)
    finally:
        await store.close()
