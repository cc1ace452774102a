"""API keys: their format, their file, and the check of every request.

A key is `wisp-<id>-<secret>`. Its secret has 256 random bits, so the file keeps a plain SHA-256 of the whole key. A
slow hash such as scrypt protects secrets that can be guessed. Nobody guesses 256 bits, and on a server each request
with a wrong key would cost milliseconds of CPU time. The id is unique and hashed with the secret, so it works as a
salt. Keys are therefore only generated, never chosen by people.

The id is not secret. It names the key in the file, in logs and in limits, and selects the one hash to compare with, in
constant time.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import re
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex, token_urlsafe
from typing import Annotated

import structlog
from pydantic import Field, TypeAdapter, ValidationError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.errors import ApiError
from services.gateway.metrics import UNAUTHORIZED
from services.gateway.settings import KeyLimits
from shared.errors import SettingsError, in_words
from shared.runtime import logging
from shared.runtime.settings import NAME_PATTERN

WATCH_INTERVAL_S = 1.0
"""Time between two checks of the file."""
OPEN_PATHS = ("/health", "/ready", "/", "/docs", "/openapi.json", "/version")
"""Paths that need no key: probes, documents, and the page, which asks for the key and sends it with its requests."""
OPEN_FOLDERS = ("/page/", "/docs/")
"""Beginnings of further such paths: files that are the same at every gateway of a version."""
SCOPE = "wisp.key"
SHAPE = re.compile(r"wisp-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
NOBODY = sha256(b"").hexdigest()
"""Compared with keys of an unknown id, so that these take as long as any other."""


class ApiKey(KeyLimits):
    """One key's entry in the file."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The holder, for people."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: datetime
    device: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """The device that owns the key. Its requests are drafted there and nowhere else."""


_FILE = TypeAdapter(list[ApiKey])


def new_key(
    name: str, created: datetime, limits: KeyLimits | None = None, device: str | None = None
) -> tuple[str, ApiKey]:
    """Return a new key's text, which is stored nowhere, and its entry for the file."""
    id_ = token_hex(6)
    text = f"wisp-{id_}-{token_urlsafe(32)}"
    given = (limits or KeyLimits()).model_dump()
    return text, ApiKey(id=id_, name=name, sha256=_digest(text), created=created, device=device, **given)


def parse(text: str, where: str) -> list[ApiKey]:
    """Parse a file's text, a JSON list. Raises SettingsError that names the file `where` and the problem."""
    try:
        keys = _FILE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        raise SettingsError(
            f"{where}: {place + ': ' if place else ''}{in_words(first)}; `wisp keys new` writes such files"
        ) from None
    for field in ("id", "name"):
        values = [getattr(key, field) for key in keys]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise SettingsError(f"{where}: two keys have the {field} {twice!r}; remove one of them")
    return keys


def render(keys: Iterable[ApiKey]) -> str:
    """Return the file's text for these keys."""
    return _FILE.dump_json(list(keys), indent=2, exclude_none=True).decode() + "\n"


class KeyRing:
    """The valid keys."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, shown: str) -> ApiKey | None:
        """Return the key with this text; None if it is not valid."""
        shape = SHAPE.fullmatch(shown)
        key = self._keys.get(shape[1]) if shape else None
        same = hmac.compare_digest(_digest(shown), key.sha256 if key else NOBODY)
        return key if same else None


class KeyFile:
    """The keys of a file. When the file becomes unreadable, the last keys stay valid and an error is logged."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError when the file cannot be read."""
        self._path = path
        self._seen = self._state()
        self.ring = self._read()
        if not len(self.ring):
            logging.get().warning("no API keys: every request is refused", file=str(path))

    async def watch(self) -> None:
        """Read the file again whenever it changes, for ever. Follows links, which Kubernetes replaces."""
        log = logging.get()
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            state = self._state()
            if state == self._seen:
                continue
            self._seen = state
            try:
                self.ring = self._read()
                log.info("API keys read", file=str(self._path), keys=len(self.ring))
            except SettingsError as error:
                log.error("API keys not read; the previous keys stay valid", error=str(error))

    def _state(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _read(self) -> KeyRing:
        try:
            text = self._path.read_text("utf-8")
        except PermissionError as error:
            raise SettingsError(
                f"the API keys cannot be read: user {os.geteuid()} of this process may not read {self._path}; "
                "let that user read it (it contains hashes, not keys)"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"the API keys cannot be read ({error}); make one with `wisp keys new NAME --file {self._path}`"
            ) from error
        return KeyRing(parse(text, str(self._path)))


class Guard:
    """ASGI middleware that refuses requests without a valid key and puts the key into the scope of the others."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # Anthropic's clients send the key in a header of its own.
        shown = bearer(headers.get(b"authorization", b"").decode("latin-1"))
        shown = shown or headers.get(b"x-api-key", b"").decode("latin-1").strip()
        key = self._keys.ring.match(shown) if shown else None
        scope[SCOPE] = key
        if key is None and not is_open(scope["path"]):
            UNAUTHORIZED.inc()
            error = refusal(shown)
            await JSONResponse(error.body_at(scope["path"]), error.status, error.headers)(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(**({"key": key.id} if key else {})):
            await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def key_of(scope: Scope) -> ApiKey | None:
    """Return the request's key; None where no keys are required."""
    key: ApiKey | None = scope.get(SCOPE)
    return key


def bearer(header: str) -> str:
    """Return the key in an Authorization header; empty if there is none."""
    scheme, _, rest = header.partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else ""


def refusal(shown: str) -> ApiError:
    """Return the error of a request without a valid key, in OpenAI's words and without repeating the key."""
    if not shown:
        text = (
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    else:
        text = f"Incorrect API key provided: {shown[:8]}***. The gateway's operator makes keys with `wisp keys new`."
    return ApiError(401, text, code="invalid_api_key", extra={"www-authenticate": "Bearer"})


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
