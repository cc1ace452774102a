"""The gateway's HTTP API over real RabbitMQ and Redis, used through the official client."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator

import aio_pika
import openai
import pytest
from gateway_peer import EOS, Script, eventually
from gateway_suite import HEADERS, MODEL, Start, Suite, chunks_of, events_of, text_of
from patience import HANG_S

from shared.messages import Failure, Result, Slo


@pytest.fixture
async def suite(shared: Suite) -> Suite:
    """The gateway that the tests of this module share, with a reset peer."""
    await shared.peer.reset()
    return shared


async def test_a_chat_is_answered(suite: Suite) -> None:
    answer = await suite.chat(seed=7)
    assert answer.choices[0].message.content == suite.peer.script.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    generate = suite.peer.generated[0]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(generate.prompt)
    assert answer.usage.completion_tokens == len(suite.peer.script.text)
    assert generate.sampling.seed == 7
    assert generate.sampling.temperature == 1.0
    assert generate.stop_ids == [EOS]
    assert generate.slo is None
    assert generate.draft == "auto"


async def test_a_chat_is_streamed_in_chat_shaped_chunks(suite: Suite) -> None:
    chunks = await chunks_of(await suite.chat(stream=True))
    assert text_of(chunks) == suite.peer.script.text
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_usage_is_in_one_extra_chunk_and_null_in_the_others(suite: Suite) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await events_of(suite.http, "/v1/chat/completions", messages=messages, stream_options=options)
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    text = suite.peer.script.text
    prompt = len(suite.peer.generated[0].prompt)
    assert events[-1]["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(text),
        "total_tokens": prompt + len(text),
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    plain = await events_of(suite.http, "/v1/chat/completions", messages=messages)
    assert not any("usage" in event for event in plain)


async def test_completions_have_their_own_shape_streamed_or_not(suite: Suite) -> None:
    whole = await suite.client.completions.create(model=MODEL, prompt="Once", max_tokens=5, seed=1)
    assert whole.object == "text_completion"
    assert whole.choices[0].text == suite.peer.script.text[:5]
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 5)
    events = await events_of(suite.http, "/v1/completions", prompt="Once", max_tokens=5)
    assert {event["object"] for event in events} == {"text_completion"}
    assert "".join(event["choices"][0]["text"] for event in events) == suite.peer.script.text[:5]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_prompts_are_lists_of_texts_or_tokens_and_are_echoed(suite: Suite) -> None:
    many = await suite.client.completions.create(model=MODEL, prompt=["ab", "c"], n=2, echo=True, max_tokens=1)
    first = suite.peer.script.text[:1]
    assert [choice.text for choice in many.choices] == ["ab" + first, "ab" + first, "c" + first, "c" + first]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (3, 4)
    ids = suite.peer.tokenizer.encode("xyz")
    one = await suite.client.completions.create(model=MODEL, prompt=ids, echo=True, max_tokens=1)
    assert one.choices[0].text == "xyz" + first
    assert suite.peer.generated[-1].prompt == ids


async def test_each_completion_has_its_index_and_seed(suite: Suite) -> None:
    chunks = await chunks_of(await suite.chat(stream=True, n=3, seed=5))
    assert [text_of(chunks, index) for index in range(3)] == [suite.peer.script.text] * 3
    seeds = [generate.sampling.seed for generate in suite.peer.generated]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert len({generate.session for generate in suite.peer.generated}) == 3


async def test_characters_are_never_split_across_chunks(suite: Suite) -> None:
    suite.peer.script = Script(text="naïve 🙂🙃 日本語 \u2028 end", round_len=1)
    events = await events_of(suite.http, "/v1/chat/completions", messages=[{"role": "user", "content": "é"}])
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == suite.peer.script.text
    assert "\ufffd" not in "".join(deltas)
    usage = (await suite.chat()).usage
    assert usage.completion_tokens == len(suite.peer.tokenizer.encode(suite.peer.script.text))
    assert usage.completion_tokens > len(suite.peer.script.text)


async def test_a_stop_string_cuts_the_text_and_cancels_the_session(suite: Suite) -> None:
    suite.peer.script = Script(text="one two STOP three " + "x" * 300, round_len=3, pause_s=0.02)
    answer = await suite.chat(stop=["nothing", "STOP"])
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("one two STOP")
    await eventually(lambda: suite.peer.cancelled == [suite.peer.generated[0].session])
    await eventually(lambda: suite.peer.refused == suite.peer.cancelled)
    streamed = await chunks_of(await suite.chat(stop="STOP", stream=True))
    assert text_of(streamed) == "one two "


async def test_the_trace_marks_accepted_draft_tokens(suite: Suite) -> None:
    events = await events_of(
        suite.http,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Hi"}],
        stream_options={"include_usage": True},
        wisp={"trace": True, "draft": "lookup"},
    )
    assert suite.peer.generated[0].draft == "lookup"
    traced = [event for event in events if "tokens" in event.get("wisp", {})]
    for event in traced:
        text = "".join(token["text"] for token in event["wisp"]["tokens"])
        assert text == event["choices"][0]["delta"]["content"]
    tokens = [token for event in traced for token in event["wisp"]["tokens"]]
    assert [token["draft"] for token in tokens] == [place % 4 != 3 for place in range(len(tokens))]
    assert [event["wisp"]["round"] for event in traced] == list(range(len(traced)))
    rounds = [one for event in events for one in event.get("wisp", {}).get("rounds", [])]
    assert [(one["round"], one["start"]) for one in rounds] == [(number, 4 * number) for number in range(5)]
    summary = events[-1]["wisp"]["summary"]
    assert sum(one["verify_ms"] for one in rounds) == pytest.approx(summary["verify_ms"])
    assert events[-1]["usage"]["completion_tokens"] == summary["tokens"] == len(tokens)
    assert summary["rounds"] == 5
    assert summary["verified"] == summary["accepted"] + 5
    assert summary["drafted"] == summary["verified"] + 5
    work = summary["draft_ms"] + summary["queue_ms"] + summary["verify_ms"]
    assert summary["messaging_ms"] == pytest.approx(max(0.0, summary["total_ms"] - work), abs=0.01)
    assert 0 < summary["ttft_ms"] <= summary["total_ms"]


async def test_the_last_chunk_and_whole_answers_have_a_trace_too(suite: Suite) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    events = await events_of(suite.http, "/v1/chat/completions", messages=messages, wisp={"trace": True})
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["wisp"]["summary"]["rounds"] == 5
    answer = await suite.chat(extra_body={"wisp": {"trace": True}}, extra_headers={"x-wisp-draft": "none"})
    assert suite.peer.generated[-1].draft == "none"
    assert "".join(token["text"] for token in answer.wisp["tokens"]) == suite.peer.script.text
    assert answer.wisp["summary"]["tokens"] == len(suite.peer.script.text)
    assert not any("wisp" in event for event in await events_of(suite.http, "/v1/chat/completions", messages=messages))


async def test_the_slo_reaches_redis_with_its_deadline(suite: Suite) -> None:
    suite.peer.script = Script(text="x" * 40, pause_s=0.05)
    headers = {"x-llm-d-slo-ttft-ms": "60000", "x-slo-tpot-ms": "500"}
    asking = asyncio.create_task(suite.chat(extra_headers=headers))
    await eventually(lambda: bool(suite.peer.generated))
    generate = suite.peer.generated[0]
    assert generate.slo == Slo(ttft_ms=60000, tpot_ms=500)
    (stored,) = await suite.peer.store.read([generate.session])
    assert stored is not None
    assert stored.request.slo == generate.slo
    assert await suite.peer.store.deadline_ms(generate.session) is not None
    await asking
    await suite.chat(service_tier="flex")
    assert suite.peer.generated[1].slo is None


@pytest.mark.parametrize("stream", [True, False])
async def test_lost_repeated_and_reordered_results_do_not_change_the_text(start: Start, stream: bool) -> None:
    def first_lost(results: list[Result]) -> list[Result]:
        return results[2:]

    def last_lost(results: list[Result]) -> list[Result]:
        return results[:-1]

    def all_lost(results: list[Result]) -> list[Result]:
        return []

    def backwards_twice(results: list[Result]) -> list[Result]:
        return [*reversed(results), *results]

    async with start(idle_check_s=0.2) as suite:
        for reorder in (first_lost, last_lost, all_lost, backwards_twice):
            suite.peer.script = Script(text="The same text, always 🙂.", round_len=3, reorder=reorder)
            answer = await suite.chat(stream=stream)
            text = text_of(await chunks_of(answer)) if stream else answer.choices[0].message.content
            assert text == suite.peer.script.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_session_at_once(suite: Suite, stream: bool) -> None:
    suite.peer.script = Script(text="x" * 400, pause_s=0.05)
    reader, writer = await asyncio.open_connection(*suite.address)
    body = json.dumps({"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{HEADERS}content-length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    if stream:
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    await eventually(lambda: bool(suite.peer.generated))
    writer.close()
    await eventually(lambda: suite.peer.cancelled == [suite.peer.generated[0].session])
    await eventually(lambda: bool(suite.peer.refused))
    await suite.until_idle()


async def test_a_slow_reader_delays_nobody_and_gets_everything(suite: Suite) -> None:
    suite.peer.script = Script(text="x" * 400, round_len=1)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(suite.address)
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    body = json.dumps(
        {"model": MODEL, "stream": True, "wisp": {"trace": True}, "messages": [{"role": "user", "content": "Hi"}]}
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{HEADERS}connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    await eventually(lambda: bool(suite.peer.generated))
    suite.peer.script = Script()
    assert (await suite.chat()).choices[0].message.content == suite.peer.script.text
    received = b""
    while part := await reader.read(4096):
        received += part
    writer.close()
    # Where this process is slow, tokens that Redis already has come together.
    assert b"".join(re.findall(rb'"content":"(x+)"', received)) == b"x" * 400
    assert b"data: [DONE]" in received


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_token_has_its_status(suite: Suite, stream: bool) -> None:
    suite.peer.script = Script(failure=Failure(code="context_length_exceeded", message="too long for any cache"))
    with pytest.raises(openai.BadRequestError, match="too long for any cache"):
        await suite.chat(stream=stream)


async def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(start: Start) -> None:
    async with start(stall_timeout_s=0.5, idle_check_s=0.1) as suite:
        suite.peer.script = Script(text="and then silence", ends=False)
        messages = [{"role": "user", "content": "Hi"}]
        events = await events_of(suite.http, "/v1/chat/completions", messages=messages)
        assert events[-1]["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="no token came"):
            await chunks_of(await suite.chat(stream=True))
        with pytest.raises(openai.APIStatusError) as caught:
            await suite.chat()
        assert caught.value.status_code == 504
        await eventually(lambda: len(suite.peer.cancelled) == 3)


async def test_a_session_cancelled_by_others_ends_in_an_error(start: Start) -> None:
    async with start(idle_check_s=0.1) as suite:
        suite.peer.script = Script(text="", ends=False)
        asking = asyncio.create_task(suite.chat())
        await eventually(lambda: bool(suite.peer.generated))
        await suite.peer.store.cancel(suite.peer.generated[0].session)
        with pytest.raises(openai.APIStatusError, match="cancelled"):
            await asking


async def test_concurrent_requests_keep_their_texts_and_counts_apart(suite: Suite) -> None:
    async def ask(length: int) -> None:
        answer = await suite.client.completions.create(
            model=MODEL, prompt="x" * length, max_tokens=length, extra_body={"wisp": {"trace": True}}
        )
        assert answer.choices[0].text == suite.peer.script.text[:length]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, length)
        assert answer.wisp["summary"]["rounds"] == -(-length // 4)  # type: ignore[attr-defined]

    await asyncio.gather(*(ask(length) for length in range(1, 20) for _ in range(2)))
    await suite.until_idle()


async def test_readiness_needs_the_brokers_and_a_verifier_of_the_model(suite: Suite) -> None:
    ready = await suite.http.get("/ready")
    assert ready.status_code == 200
    assert ready.json()["parts"] == {"rabbitmq": "ok", "redis": "ok", "verifier": "ok", "gateway": "ok"}
    suite.peer.heartbeat = suite.peer.heartbeat.model_copy(update={"fingerprint": "other"})
    await suite.peer.store.registry.beat(suite.peer.heartbeat)
    await asyncio.sleep(1.0)
    ready = await suite.http.get("/ready")
    assert ready.status_code == 503
    assert "another model" in ready.json()["parts"]["verifier"]
    with pytest.raises(openai.InternalServerError, match="another model") as caught:
        await suite.chat()
    assert caught.value.response.headers["retry-after"]
    assert [model.id async for model in suite.client.models.list()] == ["tiny"], "clients read the list once"


async def test_without_any_drafter_a_request_is_refused_at_once(start: Start, amqp_url: str, namespace: str) -> None:
    async with start() as suite:
        # First, or the peer consumes the deleted queue again, which declares it.
        assert suite.peer.leave_pool is not None
        await suite.peer.leave_pool()
        channel = await suite.peer.broker._connection.channel()
        await (await channel.get_queue(f"{namespace}.generate.pool")).delete(if_unused=False, if_empty=False)
        with pytest.raises(openai.InternalServerError, match="no drafter is running"):
            await suite.chat()


async def test_running_requests_end_when_the_gateway_stops(start: Start) -> None:
    async with start() as suite:
        suite.peer.script = Script(text="to the very end", pause_s=0.1)
        asking = asyncio.create_task(suite.chat())
        await eventually(lambda: bool(suite.peer.generated))
        suite.stop.set()
        assert (await asking).choices[0].message.content == "to the very end"
        await asyncio.wait_for(suite.serving, HANG_S)


async def test_requests_longer_than_the_drain_end_in_an_error(start: Start) -> None:
    async with start(drain_s=0.2) as suite:
        suite.peer.script = Script(text="x" * 400, pause_s=0.1)
        whole = asyncio.create_task(suite.chat())
        streamed = await suite.chat(stream=True)
        name = (await anext(aiter(streamed))).id
        suite.stop.set()
        with pytest.raises(openai.APIError, match="shutting down"):
            await chunks_of(streamed)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await whole
        await asyncio.wait_for(suite.serving, HANG_S)
        assert len(suite.peer.generated) == 2
        assert len(suite.peer.cancelled) == 1
        assert name not in suite.peer.cancelled, "another gateway can collect the stream"


async def test_a_poison_message_is_dead_lettered(suite: Suite) -> None:
    namespace = suite.peer.broker.topology.namespace
    channel = await suite.peer.broker._connection.channel()
    exchange = await channel.get_exchange(namespace)
    await exchange.publish(aio_pika.Message(b"\xc1poison"), "result.gateway-test")
    dead = await channel.get_queue(f"{namespace}.dead")
    async with asyncio.timeout(HANG_S):
        while (letter := await dead.get(no_ack=True, fail=False)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert "not msgpack" in str(letter.headers["x-wisp-reason"])
    assert (await suite.chat()).choices[0].message.content == suite.peer.script.text


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\x01\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HEADERS}content-length: 2\r\nconnection: close\r\n\r\n[]".encode(),
    ],
)
async def test_bytes_that_are_not_http_get_the_error_body(suite: Suite, request_bytes: bytes) -> None:
    reader, writer = await asyncio.open_connection(*suite.address)
    writer.write(request_bytes)
    async with asyncio.timeout(HANG_S):
        answer = await reader.read()
    writer.close()
    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_a_huge_body_is_refused_and_the_connection_stays_open(suite: Suite) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    for content in (b"x" * 10_000_000, parts()):
        response = await suite.http.post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
