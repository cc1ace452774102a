"""The HTTP server: connections, heads and bodies that clients of every kind send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic, process_time
from typing import Any

import httpx
import pytest
from patience import HANG_S
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.server import HEAD_BYTES, KEEP_ALIVE_S, MOST_TINY_PARTS, listen, serve_http

Address = tuple[str, int]
Serve = Callable[..., AbstractAsyncContextManager[Address]]
POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Send the request's body back; as a stream of two parts from /stream; without reading it from /refuse."""
    body = b""
    while scope["path"] != "/refuse":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        if not message["more_body"]:
            break
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"!", "more_body": False})
        return
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(app: ASGIApp = echo, **options: Any) -> AsyncIterator[Address]:
    """Serve an application with these options."""
    listener = listen("127.0.0.1", 0)
    stop = asyncio.Event()
    server = asyncio.create_task(serve_http(app, listener, stop, **options))
    try:
        yield listener.getsockname()
    finally:
        stop.set()
        await asyncio.wait_for(server, HANG_S)


async def exchange(address: Address, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send these parts and return all bytes until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(HANG_S):
            return await reader.read()
    finally:
        writer.close()


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    """Return the error of a raw response."""
    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    error: dict[str, Any] = json.loads(body)["error"]
    return error


async def read_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one response with a content-length."""
    async with asyncio.timeout(HANG_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return head, await reader.readexactly(int(length.split(b":")[1]))


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.2"])
async def test_an_offer_of_another_protocol_is_served_as_http_1(offer: bytes) -> None:
    head = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: " + offer + b"\r\nhttp2-settings: AAEAAEAA\r\n"
    async with serving() as address:
        reader, writer = await asyncio.open_connection(*address)
        for body in (b"first", b"and on the same connection"):
            writer.write(POST + head + b"content-length: %d\r\n\r\n" % len(body) + body)
            status, answer = await read_response(reader)
            assert status.startswith(b"HTTP/1.1 200 ")
            assert answer == body
        writer.close()


async def test_a_stream_for_http_1_0_has_no_chunks() -> None:
    async with serving() as address:
        answer = await exchange(address, b"POST /stream HTTP/1.0\r\ncontent-length: 2\r\n\r\nHi")
        head, body = answer.split(b"\r\n\r\n")
        assert body == b"Hi!"
        assert b"chunked" not in head.lower()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("part", [b"x-big: " + b"a" * HEAD_BYTES, b"x: y\r\n" * (HEAD_BYTES // 6) + b"z:"])
async def test_a_head_over_64_kb_is_refused(part: bytes, whole: bool) -> None:
    async with serving() as address:
        end = b"\r\nconnection: close\r\n\r\n" if whole else b""
        assert error_of(await exchange(address, POST + part + end), 431)["code"] == "headers_too_large"
        fits = b"x-big: " + b"a" * (HEAD_BYTES - 200) + b"\r\nconnection: close\r\ncontent-length: 2\r\n\r\nHi"
        assert (await exchange(address, POST + fits)).endswith(b"\r\n\r\nHi")


async def test_a_head_of_40_mb_is_refused_and_delays_nobody() -> None:
    async with serving() as address, httpx.AsyncClient(base_url="http://{}:{}".format(*address)) as client:
        await client.post("/echo", content=b"warm")
        huge = asyncio.create_task(exchange(address, POST + b"x-big: ", *[b"a" * (1 << 20)] * 40, b"\r\n\r\n"))
        slowest_s = 0.0
        while not huge.done():
            started_s = process_time()  # of this process alone, however busy the machine is
            assert (await client.post("/echo", content=b"Hi")).text == "Hi"
            slowest_s = max(slowest_s, process_time() - started_s)
        assert error_of(await huge, 431)["code"] == "headers_too_large"
        assert slowest_s < 1


@pytest.mark.parametrize("head", [b"P", POST, POST + b"content-le"])
async def test_a_head_that_never_ends_is_given_up(head: bytes) -> None:
    async with serving(head_timeout_s=0.3) as address:
        started_s = monotonic()
        assert error_of(await exchange(address, head), 408)["code"] == "request_timeout"
        assert monotonic() - started_s >= 0.3


async def test_a_head_that_trickles_in_is_given_up() -> None:
    async with serving(head_timeout_s=0.5) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST)

        async def trickle() -> None:
            while True:
                writer.write(b"x: y\r\n")
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        async with asyncio.timeout(HANG_S):
            assert (await reader.read(12)) == b"HTTP/1.1 408"
        trickling.cancel()
        writer.close()


async def test_the_second_head_of_a_connection_is_given_up_too() -> None:
    async with serving(head_timeout_s=0.3) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST + b"content-length: 2\r\n\r\nHi")
        assert (await read_response(reader))[1] == b"Hi"
        writer.write(POST)
        head, _ = await read_response(reader)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert await reader.read() == b""
        writer.close()


async def test_the_body_of_a_refused_request_cannot_trickle_in_for_ever() -> None:
    async with serving(head_timeout_s=0.3, keep_alive_s=1) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        await read_response(reader)
        started_s = monotonic()
        while not (reader.at_eof() or writer.is_closing()) and monotonic() - started_s < HANG_S:
            writer.write(b"x")
            await asyncio.sleep(0.02)
        assert 0.3 <= monotonic() - started_s < 60
        writer.close()


async def test_a_slow_answer_and_a_slow_body_are_not_given_up() -> None:
    async with serving(head_timeout_s=0.5, keep_alive_s=1) as address:
        answer = await exchange(
            address, POST + b"connection: close\r\ncontent-length: 3\r\n\r\n", b"a", b"b", b"c", pause_s=0.6
        )
        assert answer.endswith(b"\r\n\r\nabc")


async def test_an_idle_connection_stays_open_for_the_time_set() -> None:
    async with serving(keep_alive_s=1) as address:
        for request in (b"", POST + b"content-length: 2\r\n\r\nHi"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request)
            if request:
                await read_response(reader)
            started_s = monotonic()
            async with asyncio.timeout(HANG_S):
                assert await reader.read() == b""
            assert 0.9 <= monotonic() - started_s < 60
            writer.close()


async def test_requests_after_5_seconds_of_silence_are_not_reset() -> None:
    """Clients keep idle connections for 15 s (aiohttp), 30 s (Java) or 60 s (most proxies)."""
    assert KEEP_ALIVE_S > 60

    async def client(address: Address, number: int) -> None:
        reader, writer = await asyncio.open_connection(*address)
        for pause_s in (4.9 + number / 300, 0):
            writer.write(POST + b"content-length: 2\r\n\r\nHi")
            assert (await read_response(reader))[1] == b"Hi"
            await asyncio.sleep(pause_s)
        writer.close()

    async with serving() as address:
        await asyncio.gather(*(client(address, number) for number in range(60)))


async def test_a_body_in_many_tiny_parts_is_refused() -> None:
    tiny = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + b"1\r\nx\r\n" * (MOST_TINY_PARTS + 1)
    async with serving() as address:
        assert error_of(await exchange(address, POST + tiny + b"0\r\n\r\n"), 400)["code"] == "invalid_http"
        fine = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + b"1\r\nx\r\n" * MOST_TINY_PARTS
        assert (await exchange(address, POST + fine + b"0\r\n\r\n")).endswith(b"x" * MOST_TINY_PARTS)


async def test_a_body_that_breaks_off_in_the_middle_is_refused_once() -> None:
    async with serving() as address:
        answer = await exchange(address, POST + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\nnonsense\r\n")
        assert error_of(answer, 400)["code"] == "invalid_http"


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        ("http://api.example:80/echo?a=1", "/echo?a=1", "api.example:80"),
        ("HTTPS://api.example", "/", "api.example"),
        ("http://user:word@api.example/a/b", "/a/b", "api.example"),
        ("http://api.example?a=/b", "/?a=/b", "api.example"),
        ("/http://api.example/", "/http://api.example/", "other"),
    ],
)
async def test_a_whole_url_as_target_names_path_and_host(target: str, path: str, host: str) -> None:
    async def describe(scope: Scope, receive: Receive, send: Send) -> None:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        body = scope["raw_path"] + query + b" " + dict(scope["headers"])[b"host"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async with serving(describe) as address:
        head = f"GET {target} HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n"
        answer = await exchange(address, head.encode())
    assert f"{path} {host}" in answer.decode()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as address:
        one = POST + b"content-length: 1\r\n\r\n"
        last = POST + b"connection: close\r\ncontent-length: 1\r\n\r\n"
        answer = await exchange(address, one + b"1" + one + b"2" + last + b"3")
        assert [part[:1] for part in answer.split(b"\r\n\r\n")[1:]] == [b"1", b"2", b"3"]
