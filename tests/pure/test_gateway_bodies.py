"""Bodies of requests: compressed, too long, late or never complete."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from gateway_app import HELLO, JSON_TYPE, MODEL, App, error_of
from gateway_peer import eventually
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shared.messages import Message
from shared.models.folder import ModelFolder


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate, gzip", "gzip, gzip"])
async def test_other_compressions_are_refused(app: App, encoding: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await app.http.post(path, content=b"\x1f\x8b", headers={"content-encoding": encoding})
        assert error_of(response, 415)["code"] == "unsupported_content_encoding"
        assert response.headers["accept-encoding"] == "gzip, identity"
    plain = await app.http.post("/v1/chat/completions", json=HELLO, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


async def test_gzip_bodies_are_unpacked_up_to_the_limit(folder: ModelFolder) -> None:
    app = App(folder, max_body_bytes=5000)
    body = gzip.compress(json.dumps(HELLO).encode())
    for encoding in ("gzip", "GZIP", "x-gzip"):
        answer = await app.http.post("/v1/chat/completions", content=body, headers={"content-encoding": encoding})
        assert answer.status_code == 200
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) > 5000
    assert error_of(await gzipped(app, bomb), 413)["code"] == "request_too_large"
    assert error_of(await gzipped(app, gzip.compress(b" " * 5001)), 413)["code"] == "request_too_large"
    assert error_of(await gzipped(app, b"no gzip"), 400)["code"] == "invalid_encoding"
    assert error_of(await gzipped(app, body[:-9]), 400)["code"] == "invalid_encoding"


async def gzipped(app: App, body: bytes) -> httpx.Response:
    return await app.http.post("/v1/chat/completions", content=body, headers={"content-encoding": "gzip"})


async def test_a_client_that_goes_away_while_sending_gets_a_499(app: App) -> None:
    events = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return events.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": JSON_TYPE, "query_string": b""}
    await app.asgi(scope, receive, send)
    assert sent[0]["status"] == 499


async def test_a_client_that_goes_away_during_the_start_ends_its_session(app: App) -> None:
    starting = asyncio.Event()

    async def deaf(message: Message) -> None:
        starting.set()
        with suppress(asyncio.CancelledError):  # like a library that receives its answer at this moment
            await asyncio.sleep(60)

    async def receive() -> Any:
        if not sent:
            sent.append("body")
            return {"type": "http.request", "body": json.dumps(HELLO).encode()}
        await starting.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    sent: list[str] = []
    app.services.draft = deaf
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": JSON_TYPE,
        "query_string": b"",
    }
    request = asyncio.create_task(app.asgi(scope, receive, send))
    await eventually(request.done)
    assert app.sessions.running == 0
    await eventually(lambda: len(app.services.cancelled) == 1)
    assert sent == ["body"]


async def test_a_body_with_too_large_a_content_length_is_not_read(folder: ModelFolder) -> None:
    app = App(folder, max_body_bytes=1024)
    read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"x" * 5000

    response = await app.http.post("/v1/chat/completions", content=parts(), headers={"content-length": "5000"})
    assert error_of(response, 413)["code"] == "request_too_large"
    assert read == 0


async def test_a_body_that_grows_too_long_is_not_read_to_its_end(folder: ModelFolder) -> None:
    app = App(folder, max_body_bytes=1024)
    read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b"x" * 500

    assert error_of(await app.http.post("/v1/completions", content=parts()), 413)["code"] == "request_too_large"
    assert read <= 4


async def test_a_body_that_never_comes_times_out(folder: ModelFolder) -> None:
    app = App(folder, body_timeout_s=0.05)

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    assert error_of(await app.http.post("/v1/completions", content=parts()), 408)["code"] == "request_timeout"


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.sampled_from(["", "user", MODEL, "\u2028x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "trace", "draft"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ["model", "messages", "prompt", "stream", "n", "stop", "seed", "max_tokens", "temperature", "wisp", "echo"]


@given(
    fields=st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=4),
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
)
@hypothesis_settings(
    max_examples=3 * hypothesis_settings.default.max_examples // 2,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_any_body_is_answered_or_refused(app: App, fields: dict[str, Any], path: str) -> None:
    body = json.dumps(HELLO | {"prompt": "x"} | fields).encode()
    response = await app.http.post(path, content=body)
    if response.status_code != 200:
        error_of(response, response.status_code)
        assert response.status_code in (400, 404)
