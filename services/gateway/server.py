"""uvicorn, run inside our own process frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.errors import invalid
from services.gateway.stream import encode


class Server(uvicorn.Server):
    """Leaves the process's signal handlers alone: `shared.service` has its own."""

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
