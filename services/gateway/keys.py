"""Who may ask: the file of API keys, read again when it changes, and the check that every request passes first."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.core.keys import ApiKey, KeyRing, parse
from services.gateway.errors import ApiError
from services.gateway.metrics import Metrics
from shared.errors import SettingsError
from shared.runtime import logging

LOOK_S = 1.0
"""Time between two looks at the file."""
OPEN = ("/health", "/ready")
"""What is answered without a key, for the probes of whoever runs the gateway."""
SCOPE = "wisp.key"


class KeyFile:
    """The keys of a file. One that cannot be read any more leaves the last good keys in force, and says so."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError when the file cannot be read now."""
        self._path = path
        self._seen = self._state()
        self.ring = self._read()
        if not len(self.ring):
            logging.get().warning("no API keys: every request is refused", file=str(path))

    async def watch(self) -> None:
        """Read the file again whenever it changes, for ever. Links are followed: Kubernetes replaces them."""
        log = logging.get()
        while True:
            await asyncio.sleep(LOOK_S)
            state = self._state()
            if state == self._seen:
                continue
            self._seen = state
            try:
                self.ring = self._read()
                log.info("API keys read", file=str(self._path), keys=len(self.ring))
            except SettingsError as error:
                log.error("API keys not read: those of before stay in force", error=str(error))

    def _state(self) -> tuple[int, int, int] | None:
        try:
            about = self._path.stat()
        except OSError:
            return None
        return about.st_ino, about.st_mtime_ns, about.st_size

    def _read(self) -> KeyRing:
        try:
            text = self._path.read_text("utf-8")
        except PermissionError as error:
            raise SettingsError(
                f"the API keys cannot be read: {self._path} is closed to this process, whose user is {os.geteuid()}; "
                "let that user read it (it holds hashes, no keys)"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"the API keys cannot be read ({error}); make one with `wisp keys new NAME --file {self._path}`"
            ) from error
        return KeyRing(parse(text, str(self._path)))


class Guard:
    """Lets only requests with a key pass, and notes in their scope whose it is."""

    def __init__(self, app: ASGIApp, keys: KeyFile, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        shown = bearer(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
        key = self._keys.ring.match(shown) if shown else None
        scope[SCOPE] = key
        if key is None and scope["path"] not in OPEN:
            self._metrics.unauthorized.inc()
            error = refusal(shown)
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(**({"key": key.id} if key else {})):
            await self._app(scope, receive, send)


def key_of(scope: Scope) -> ApiKey | None:
    """Whose request this is; None where no keys are asked for."""
    key: ApiKey | None = scope.get(SCOPE)
    return key


def bearer(header: str) -> str:
    """The key in an Authorization header; empty if it has none."""
    scheme, _, rest = header.partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else ""


def refusal(shown: str) -> ApiError:
    """What a request without a good key is told, in OpenAI's words and without repeating the key."""
    if not shown:
        text = (
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    else:
        text = f"Incorrect API key provided: {shown[:8]}***. Whoever runs this gateway makes keys with `wisp keys new`."
    return ApiError(401, text, code="invalid_api_key", extra={"www-authenticate": "Bearer"})
