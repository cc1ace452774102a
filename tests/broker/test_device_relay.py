"""A device's API in front of a gateway with API keys: the gateway's API with the device's key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_peer import Script, eventually
from gateway_suite import MODEL, Start, Suite, chunks_of, free_port, text_of
from patience import HANG_S

from services.device.relay import device_api
from services.gateway.keys import new_key, render
from services.gateway.server import listen, serve_http


@pytest.fixture
async def suite(start: Start, tmp_path: Path) -> AsyncIterator[tuple[Suite, str]]:
    text, key = new_key("ann", datetime.now(UTC))
    file = tmp_path / "keys.json"
    file.write_text(render([key]))
    async with start(api_keys_file=file) as running:
        yield running, text


@asynccontextmanager
async def relayed(url: str, key: str) -> AsyncIterator[str]:
    """Run a relay to this gateway; yields its URL."""
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=HANG_S) as gateway:
        serving = asyncio.create_task(serve_http(device_api(gateway), listener, stop))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            await serving


async def test_a_client_without_a_key_is_served_like_by_the_gateway(suite: tuple[Suite, str]) -> None:
    running, key = suite
    async with (
        relayed(running.url, key) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANG_S) as client,
    ):
        assert [model.id for model in (await client.models.list()).data] == [MODEL]
        script = running.peer.script = Script(pause_s=0.02)
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        assert text_of(await chunks_of(stream)) == script.text
        whole = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], seed=7, extra_headers={"x-slo-tpot-ms": "900"}
        )
        assert whole.headers["x-wisp-seed"] == "7"
        assert whole.parse().choices[0].message.content == script.text
        slo = running.peer.generated[-1].slo
        assert slo is not None
        assert slo.tpot_ms == 900
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model=MODEL, messages=[], max_tokens=0)
        assert wrong.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.get("/health")).json() == {"status": "ok"}
            assert (await http.get("/ready")).json()["parts"]["redis"] == "ok"
            assert (await http.get("/metrics")).status_code == 404


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_stream_is_resumed_after_the_last_event(suite: tuple[Suite, str], method: str) -> None:
    running, key = suite
    script = running.peer.script = Script(pause_s=0.02)
    asked = {"model": MODEL, "prompt": "Hi", "max_tokens": 64, "stream": True, "wisp": {"resumable": True}}
    async with relayed(running.url, key) as url, httpx.AsyncClient(base_url=url, timeout=HANG_S) as http:
        async with http.stream("POST", "/v1/completions", json=asked) as answer:
            last_id, first = await _first_event(answer)
        path = "/v1/completions" if method == "POST" else f"/v1/streams/{first['id']}"
        body = asked if method == "POST" else None
        async with http.stream(method, path, json=body, headers={"last-event-id": last_id}) as answer:
            assert answer.status_code == 200, await answer.aread()
            lines = [line async for line in answer.aiter_lines()]
    rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    texts = [choice["text"] for event in (first, *rest) for choice in event["choices"]]
    assert "".join(texts) == script.text
    assert texts[0]
    assert len(running.peer.generated) == 1


async def _first_event(answer: httpx.Response) -> tuple[str, dict[str, Any]]:
    """Return the id and the data of the first event of an answer that is left after it."""
    last_id = ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            last_id = line[4:]
        elif line.startswith("data: {"):
            return last_id, json.loads(line[6:])
    raise AssertionError("no event came")


async def test_pages_in_browsers_are_not_served(suite: tuple[Suite, str]) -> None:
    running, key = suite
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    async with relayed(running.url, key) as url, httpx.AsyncClient(base_url=url) as http:
        for headers, status in (
            ({"content-type": "text/plain"}, 415),
            ({}, 415),
            ({"content-type": "application/json", "host": "evil.example"}, 403),
            ({"content-type": "application/json", "content-encoding": "br"}, 415),
        ):
            answer = await http.post("/v1/chat/completions", content=body, headers=headers)
            assert answer.status_code == status
    assert running.peer.generated == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_session(suite: tuple[Suite, str], stream: bool) -> None:
    running, key = suite
    running.peer.script = Script(ends=False)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    async with relayed(running.url, key) as url, httpx.AsyncClient(base_url=url) as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=asked))
        await eventually(lambda: bool(running.peer.generated))
        asking.cancel()
        await eventually(lambda: bool(running.peer.cancelled))


async def test_a_missing_gateway_and_a_refused_key_are_reported(suite: tuple[Suite, str]) -> None:
    running, _ = suite
    async with relayed(running.url, "wrong") as url, httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/v1/models")).json()["error"]["code"] == "invalid_api_key"
    async with relayed(f"http://127.0.0.1:{free_port()}", "x") as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gateway_unavailable")
    assert answer.headers["retry-after"] == "2"
