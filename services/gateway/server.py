"""uvicorn in our own process frame, with or without TLS: from the open port to the end of the last request."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.gateway.errors import ApiError, invalid
from services.gateway.stream import encode
from shared.errors import SettingsError
from shared.runtime import logging
from shared.runtime.service import running
from shared.runtime.tls import load_chain, server_context

CLOSING_S = 5
"""Time for connections to close after the last session has ended."""
CERTIFICATE_CHECK_S = 5.0
"""Time between two checks of the certificate's files."""
HEAD_BYTES = 64 << 10
"""Longest head of a request: its request line and headers."""
MOST_TINY_PARTS, TINY_BYTES = 10_000, 64
"""A body of more parts than this, shorter than this on average (bytes), is refused: each part costs some 10 µs."""
LINGER_S = 5.0
"""Time in which the rest of a request that is not read is discarded, so that its client gets the answer.

Closing a connection with unread data resets it, and the client may lose the answer.
"""
KEEP_ALIVE_S = 75
"""Longer than proxies and clients keep idle connections (60 s or less), so that they close first."""
HEAD_TIMEOUT_S = 30.0
HTTPS_PREFIX = "https"
_URL = re.compile(rb"https?://(?:[^/?#@]*@)?(?P<authority>[^/?#@]+)(?P<rest>[^#]*).*", re.IGNORECASE)


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
    keep_alive_s: int = KEEP_ALIVE_S,
    head_timeout_s: float = HEAD_TIMEOUT_S,
    certificate: Certificate | None = None,
    **log_fields: str,
) -> None:
    """Serve an application until `stop` is set, then call `drain` and let the running requests end.

    `loops` run beside it, as in `shared.runtime.service.running`. Requests may take `drain_s` seconds to end, and
    CLOSING_S more. A connection stays open for `keep_alive_s` without a request, and a client has `head_timeout_s`
    to send a request's head. `log_fields` are added to the log line with the URL.
    """
    server = _UvicornServer(
        _HttpConfig(
            _HeadLimit(app),
            head_timeout_s=head_timeout_s,
            timeout_keep_alive=keep_alive_s,
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


class _HttpConfig(uvicorn.Config):
    """uvicorn's configuration with a time limit for heads, which uvicorn lacks."""

    def __init__(self, app: ASGIApp, *, head_timeout_s: float, **options: Any) -> None:
        super().__init__(app, **options)
        self.head_timeout_s = head_timeout_s


def _in_origin_form(request: h11.Request) -> h11.Request:
    """Return a request whose target is a path. A whole URL replaces the header Host (RFC 9112, section 3.2.2)."""
    url = _URL.fullmatch(request.target)
    if url is None:
        return request
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        headers=[*headers, (b"host", url["authority"])],
        target=url["rest"] if url["rest"].startswith(b"/") else b"/" + url["rest"],
        http_version=request.http_version,
    )


class _Connection(h11.Connection):
    """h11's connection, which also takes whole URLs as targets and refuses bodies in very many tiny parts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parts = self._body_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event. Raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._parts += 1
            self._body_bytes += len(event.data)
            if self._parts > MOST_TINY_PARTS and self._body_bytes < self._parts * TINY_BYTES:
                raise h11.RemoteProtocolError("too many tiny parts")
        elif isinstance(event, h11.Request):
            self._parts = self._body_bytes = 0
            return _in_origin_form(event)
        return event


class _HttpProtocol(H11Protocol):
    """uvicorn's protocol on h11, with bounds on the time and work that a client can cost before it has an answer.

    h11 (instead of the faster httptools) bounds the size of a head in linear time, serves requests that offer another
    protocol (`Upgrade: h2c`), and answers HTTP/1.0 without chunks.
    """

    config: _HttpConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Connection(h11.SERVER, HEAD_BYTES)
        self._refused = False
        self._overdue: asyncio.TimerHandle | None = None
        """Closes the connection unless the client completes what it has begun to send."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request as long as for a later one."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._keep_alive()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._unset_overdue()

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent, unless it is the rest of a refused request."""
        if not self._refused:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        """Wait for the rest of the request, or for the next one."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP, or a head that is too long, and close the connection."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(_head_too_long())
        else:
            self._refuse(invalid("this is not an HTTP/1.1 request", code="invalid_http"))

    def _should_upgrade(self) -> bool:
        """Serve requests that offer another protocol as HTTP/1.1."""
        return False

    def _watch(self) -> None:
        """Limit the time in which a client completes the head, or the unread body, of a request."""
        if self._refused or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._unset_overdue()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._unset_overdue()
            self._keep_alive()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(self.config.head_timeout_s, self._head_overdue)

    def _keep_alive(self) -> None:
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _unset_overdue(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _head_overdue(self) -> None:
        text = f"the request's head did not arrive in {self.config.head_timeout_s:g} s"
        self._refuse(ApiError(408, text, code="request_timeout"), linger_s=0)

    def _refuse(self, error: ApiError, linger_s: float = LINGER_S) -> None:
        """Answer in place of the application, discard the rest of the request and close the connection."""
        self._refused = True
        self._unset_overdue()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = encode(error.body())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._overdue = self.loop.call_later(linger_s, self.transport.close)


class _HeadLimit:
    """ASGI middleware that refuses heads longer than HEAD_BYTES.

    h11 refuses incomplete ones; one that arrives at once may be complete and longer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
        if size <= HEAD_BYTES:
            await self._app(scope, receive, send)
            return
        error = _head_too_long()
        await JSONResponse(error.body(), error.status)(scope, receive, send)


def _head_too_long() -> ApiError:
    text = f"the request's line and headers are longer than {HEAD_BYTES >> 10} KB"
    return ApiError(431, text, code="headers_too_large")


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
