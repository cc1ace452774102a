"""uvicorn in our own process frame, with or without TLS: from the open port to the end of the last request."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.errors import encode, invalid
from shared.errors import SettingsError
from shared.runtime import logging
from shared.runtime.service import running
from shared.runtime.tls import load_chain, server_context

CLOSING_S = 5
"""Time for connections to close after the last session has ended."""
CERTIFICATE_CHECK_S = 5.0
"""Time between two checks of the certificate's files."""
HTTPS_PREFIX = "https"


def listen(host: str, port: int) -> socket.socket:
    """Open a port. Raises SettingsError if that is impossible."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error}); choose another WISP_HOST or WISP_PORT"
        ) from error


async def serve_http(
    app: ASGIApp,
    listener: socket.socket,
    stop: asyncio.Event,
    *loops: Coroutine[Any, Any, None],
    drain: Callable[[], Awaitable[None]] | None = None,
    drain_s: float = 0.0,
    certificate: Certificate | None = None,
    **log_fields: str,
) -> None:
    """Serve an application until `stop` is set, then call `drain` and let the running requests end.

    `loops` run beside it, as in `shared.runtime.service.running`. Requests may take `drain_s` seconds to end, and
    CLOSING_S more. `log_fields` are added to the log line with the URL.
    """
    server = _UvicornServer(
        uvicorn.Config(
            app,
            http=_HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(drain_s) + CLOSING_S,
            ssl_context_factory=certificate.factory if certificate else None,
        )
    )
    host, port = listener.getsockname()[:2]
    scheme = "https" if certificate else "http"
    logging.get().info("serving", url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1", **log_fields)
    closed = asyncio.Event()

    async def serving() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            closed.set()

    watches = [certificate.watch()] if certificate else []
    async with running(stop, serving(), *watches, *loops):
        server.should_exit = True
        if drain is not None:
            await drain()
        await closed.wait()


class _UvicornServer(uvicorn.Server):
    """uvicorn without its signal handlers, because `shared.runtime.service` has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals."""
        yield


class _HttpProtocol(HttpToolsProtocol):
    """Answers bytes that are not HTTP with the API's error body."""

    def send_400_response(self, msg: str) -> None:
        """Refuse the request and close the connection."""
        body = encode(invalid("this is not an HTTP/1.1 request", code="invalid_http").body())
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class Certificate:
    """A certificate and its key in files, read again when they change. Later connections use the new certificate.

    While new files cannot be used, the previous ones stay in use.
    """

    def __init__(self, cert_file: Path, key_file: Path | None) -> None:
        """Raises SettingsError when the files cannot be used."""
        self._cert_file, self._key_file = cert_file, key_file
        self._seen = self._state()
        self.context: ssl.SSLContext = server_context(cert_file, key_file, HTTPS_PREFIX)

    def factory(self, _config: object, _default: object) -> ssl.SSLContext:
        """Return the context, in the form of uvicorn's factory."""
        return self.context

    async def watch(self) -> None:
        """Read the files again whenever they change, for ever."""
        log = logging.get()
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK_S)
            state = self._state()
            if state == self._seen:
                continue
            try:
                # First in a context of its own: a context that took half of a new pair would serve nobody.
                server_context(self._cert_file, self._key_file, HTTPS_PREFIX)
                load_chain(self.context, self._cert_file, self._key_file, HTTPS_PREFIX)
            except SettingsError as error:
                log.error("certificate not read; the previous one stays in use", error=str(error))
            else:
                log.info("certificate read", file=str(self._cert_file))
            self._seen = state

    def _state(self) -> list[tuple[int, int, int] | None]:
        state: list[tuple[int, int, int] | None] = []
        for path in (self._cert_file, self._key_file or self._cert_file):
            try:
                stat = path.stat()
                state.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
            except OSError:
                state.append(None)
        return state
