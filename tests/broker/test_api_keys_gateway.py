"""A gateway with API keys, through the official client: access, limits and rate-limit headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_peer import Script, eventually
from gateway_suite import MODEL, Start, Suite, chunks_of
from patience import HANG_S

from services.gateway.keys import KeyLimits, new_key, render

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


class Holder:
    """A person with a key."""

    def __init__(self, name: str, **limits: int) -> None:
        self.text, self.key = new_key(name, datetime.now(UTC), KeyLimits(**limits))

    def client(self, suite: Suite) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{suite.url}/v1", api_key=self.text, max_retries=0, timeout=HANG_S)

    async def chat(self, suite: Suite, **options: Any) -> Any:
        async with self.client(suite) as client:
            return await client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text("[]")
    return path


@pytest.fixture
async def suite(start: Start, file: Path) -> AsyncIterator[Suite]:
    async with start(api_keys_file=file) as running:
        yield running


def write(file: Path, text: str) -> None:
    file.write_text(text)


async def write_keys(suite: Suite, file: Path, *holders: Holder) -> None:
    """Write the keys of these holders, and wait until the gateway has read them."""
    write(file, render([holder.key for holder in holders]))
    for holder in holders:
        await becomes(suite, holder, True)


async def accepted(suite: Suite, holder: Holder) -> bool:
    return (await suite.http.get("/v1/models", headers=bearer(holder))).status_code == 200


async def becomes(suite: Suite, holder: Holder, wanted: bool) -> None:
    async with asyncio.timeout(HANG_S):
        while await accepted(suite, holder) != wanted:  # noqa: ASYNC110 - the gateway gives no signal
            await asyncio.sleep(0.05)


def bearer(holder: Holder) -> dict[str, str]:
    return {"authorization": f"Bearer {holder.text}"}


async def test_keys_come_and_go_while_the_gateway_runs(suite: Suite, file: Path) -> None:
    ann, bob = Holder("ann"), Holder("bob")

    with pytest.raises(openai.AuthenticationError) as refused:
        await ann.chat(suite)
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "invalid_request_error"
    await write_keys(suite, file, ann)
    suite.peer.script = Script(pause_s=0.4)
    stream = await ann.client(suite).chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    # As in Kubernetes: the name is a link, which is replaced.
    other = file.with_name("other.json")
    write(other, render([bob.key]))
    link = file.with_name("link")
    link.symlink_to(other)
    link.replace(file)
    await becomes(suite, bob, True)
    assert not await accepted(suite, ann)
    assert chunks_of_text(await chunks_of(stream)) == suite.peer.script.text
    write(other, "rubbish")
    await asyncio.sleep(2.5)
    assert await accepted(suite, bob), "a broken file keeps the previous keys"
    write(other, "[]")
    await becomes(suite, bob, False)


def chunks_of_text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_rate_limit_headers_count_down_to_a_429(suite: Suite, file: Path) -> None:
    ann, bob = Holder("ann", requests_per_minute=2, tokens_per_minute=5000), Holder("bob")
    await write_keys(suite, file, ann, bob)
    first = await ann.chat(suite, max_tokens=100)
    usage = first.parse().usage
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "5000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) == 5000 - usage.prompt_tokens - 100
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    second = await ann.chat(suite, max_tokens=100)
    left = int(second.headers["x-ratelimit-remaining-tokens"])
    # The first request was charged for the tokens used, not for those requested.
    assert 0 <= left - (5000 - usage.total_tokens - usage.prompt_tokens - 100) < 500
    with pytest.raises(openai.RateLimitError) as refused:
        await ann.chat(suite)
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-llm-d-request-dropped-reason" not in refused.value.response.headers
    free = await bob.chat(suite)
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    text = (await suite.http.get("/metrics", headers=bearer(bob))).text
    assert 'wisp_requests_limited_total{limit="requests"} 1.0' in text


async def test_a_request_too_large_for_a_minute_is_not_retried(suite: Suite, file: Path) -> None:
    ann = Holder("ann", tokens_per_minute=60)
    await write_keys(suite, file, ann)
    async with openai.AsyncOpenAI(base_url=f"{suite.url}/v1", api_key=ann.text, max_retries=3) as client:
        with pytest.raises(openai.RateLimitError, match="Request too large") as refused:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=400)
    assert refused.value.type == "tokens"
    assert suite.peer.generated == []


async def test_only_its_holder_resumes_a_stream_and_is_charged_once(suite: Suite, file: Path) -> None:
    ann, bob = Holder("ann", requests_per_minute=2, tokens_per_minute=10_000, max_sessions=1), Holder("bob")
    await write_keys(suite, file, ann, bob)
    suite.peer.script = Script(text="word " * 40, round_len=2, pause_s=0.05)
    asked = {"model": MODEL, "prompt": "x", "max_tokens": 500, "stream": True, "wisp": {"resumable": True}}
    asked |= {"stream_options": {"include_usage": True}}
    lines: list[str] = []
    async with suite.http.stream("POST", "/v1/completions", json=asked, headers=bearer(ann)) as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if len(lines) > 20:
                break
    last_id = [line for line in lines if line.startswith("id: ")][-1].removeprefix("id: ")
    again = {"last-event-id": last_id}
    await asyncio.sleep(0.5)  # it runs on without a client
    stranger = await suite.http.post("/v1/completions", json=asked, headers=bearer(bob) | again)
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "stream_gone")
    rest = await suite.http.post("/v1/completions", json=asked, headers=bearer(ann) | again)
    assert rest.status_code == 200
    assert rest.headers["x-ratelimit-remaining-requests"] == "1"
    usage = [json.loads(line[6:]) for line in rest.text.split("\n") if line.startswith("data: {")][-1]["usage"]
    before = int(rest.headers["x-ratelimit-remaining-tokens"])
    assert 10_000 - usage["total_tokens"] < before
    await asyncio.sleep(0.3)  # settling happens beside the answer
    last = await ann.chat(suite, max_tokens=100)
    left = int(last.headers["x-ratelimit-remaining-tokens"])
    spent = 10_000 - (left + last.parse().usage.prompt_tokens + 100)
    # Meanwhile the allowance grows by about 167 tokens a second.
    assert usage["total_tokens"] - 600 < spent <= usage["total_tokens"]


async def test_concurrent_completions_of_a_key_are_limited(suite: Suite, file: Path) -> None:
    ann, bob = Holder("ann", max_sessions=2), Holder("bob")
    await write_keys(suite, file, ann, bob)
    suite.peer.script = Script(ends=False)
    client = ann.client(suite)
    streams = [
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=400, stream=True)
        for _ in range(2)
    ]
    with pytest.raises(openai.RateLimitError, match="concurrent completions: Limit 2"):
        await ann.chat(suite)
    suite.peer.script = Script()
    assert (await bob.chat(suite)).status_code == 200
    await streams[0].close()
    await eventually(lambda: bool(suite.peer.cancelled))
    async with asyncio.timeout(HANG_S):
        while True:
            try:
                await ann.chat(suite)
                break
            except openai.RateLimitError:
                await asyncio.sleep(0.05)
    with pytest.raises(openai.RateLimitError, match="concurrent completions"):
        await ann.chat(suite, n=2)
    await streams[1].close()
    await client.close()
