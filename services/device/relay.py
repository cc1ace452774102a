"""The API on the device: forwards requests to the cluster's gateway with the device's key, and streams its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.browsers import BrowserGuard
from services.gateway.errors import ApiError, unavailable
from services.gateway.stream import encode
from shared.runtime import logging

PATHS = ("/v1/", "/ready")
FORWARDED = ("accept", "content-encoding", "content-type", "last-event-id", "x-request-id")
FORWARDED_PREFIXES = ("x-slo-", "x-llm-d-", "x-wisp-")
"""Request headers that the gateway reads, besides the key."""
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"})
"""Response headers that belong to the connection to the gateway, and are not forwarded."""
LONGEST_BODY = 32 << 20
"""Longest request body in bytes. Each gateway has its own limit, which is usually lower."""


def device_api(gateway: httpx.AsyncClient, hosts: Collection[str] = ()) -> ASGIApp:
    """Return the device's API as an ASGI application. Programs on the device need no key; web pages are refused.

    gateway: as for `Relay`. hosts: names of the device besides loopback ones.
    """
    return BrowserGuard(Relay(gateway), hosts)


class Relay:
    """An ASGI application. When a client goes away, its request to the gateway is cancelled."""

    def __init__(self, gateway: httpx.AsyncClient) -> None:
        """gateway: HTTP client with the gateway's base URL, without /v1, and with the device's key."""
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        begun = events = False

        async def sending(message: Message) -> None:
            nonlocal begun, events
            if message["type"] == "http.response.start":
                begun = True
                events = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            await send(message)

        try:
            if scope["path"] == "/health":
                await _respond(sending, 200, {"status": "ok"})
            elif scope["path"].startswith(PATHS):
                await self._relay(scope, receive, sending)
            else:
                raise ApiError(404, f"unknown request: {scope['method']} {scope['path'][:200]}", code="unknown_url")
        except ApiError as error:
            if not begun:
                await _respond(sending, error.status, error.body(), error.headers)
                return
            logging.get().warning("answer broken", error=error.message)
            if events:
                # An error event without [DONE], so that the client does not take the stream for complete.
                await send({"type": "http.response.body", "body": b"data: " + encode(error.body()) + b"\n\n"})

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            return
        work = asyncio.ensure_future(self._forward(scope, body, send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, ApiError):
                    await task

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        headers = {name: value for name, value in given.items() if name in FORWARDED or _is_ours(name)}
        url = httpx.URL(scope["path"], query=scope["query_string"] or None)
        try:
            async with self._gateway.stream(scope["method"], url, headers=headers, content=body) as answer:
                received = [(name.lower(), value) for name, value in answer.headers.raw]
                forwarded = [(name, value) for name, value in received if name not in HOP_BY_HOP]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": forwarded})
                async for part in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx.HTTPError as error:
            text = f"the cluster's gateway cannot be reached ({error or type(error).__name__})"
            raise unavailable(text, "gateway_unavailable", retry_after_s=2) from error


def _is_ours(name: str) -> bool:
    # The device's key determines the pool, so a client must not name another one.
    return name.startswith(FORWARDED_PREFIXES) and name != "x-wisp-pool"


async def _body(receive: Receive) -> bytes | None:
    """Return the request's body; None if the client went away."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > LONGEST_BODY:
            raise ApiError(413, f"the request's body is longer than {LONGEST_BODY} bytes", code="request_too_large")
        if not message.get("more_body"):
            return bytes(body)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, status: int, fields: dict[str, object], headers: dict[str, str] | None = None) -> None:
    body = encode(fields)
    all_headers = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
