"""uvicorn, run inside our own process frame: from an open port to the orderly end of the last request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.app import Gateway, create_app
from services.gateway.errors import invalid
from services.gateway.https import Certificate
from services.gateway.stream import encode
from shared.errors import SettingsError
from shared.runtime import logging
from shared.runtime.service import running

CLOSING_S = 5
"""Time for connections to be closed after the last session has ended."""


def listen(host: str, port: int) -> socket.socket:
    """An open port. Raises SettingsError if it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error}); choose another WISP_HOST or WISP_PORT"
        ) from error


async def serve_api(
    gateway: Gateway, listener: socket.socket, stop: asyncio.Event, *loops: Coroutine[Any, Any, None]
) -> None:
    """Serve the HTTP API until `stop` is set, then let the running requests end.

    `loops` run beside it, as in `shared.runtime.service.running`.
    """
    log, settings, backend = logging.get(), gateway.settings, gateway.backend
    certificate = None
    if settings.https_cert_file is not None:
        certificate = Certificate(settings.https_cert_file, settings.https_key_file)
    server = Server(
        uvicorn.Config(
            create_app(gateway),
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.drain_s) + CLOSING_S,
            ssl_context_factory=certificate.factory if certificate else None,
        )
    )
    host, port = listener.getsockname()[:2]
    scheme = "https" if certificate else "http"
    log.info("serving", url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1", model=gateway.model)
    watches = [backend.watch()]
    watches += [gateway.keys.watch()] if gateway.keys else []
    watches += [certificate.watch()] if certificate else []
    closed = asyncio.Event()

    async def serving() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            closed.set()

    async with running(stop, serving(), *watches, *loops):
        log.info("draining", sessions=backend.running)
        server.should_exit = True
        await backend.drain(settings.drain_s)
        await closed.wait()
        await gateway.ledger.settled()


class Server(uvicorn.Server):
    """Leaves the process's signal handlers alone: `shared.runtime.service` has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Protocol(HttpToolsProtocol):
    """Answers what is no HTTP with the API's error body as well."""

    def send_400_response(self, msg: str) -> None:
        """Refuse and close the connection."""
        body = encode(invalid("this is no HTTP/1.1 request", code="invalid_http").body())
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
