"""API keys: how they look, how a file keeps them, and whose key a request shows. Pure.

A key is `wisp-<id>-<secret>`. Its secret is 256 random bits, so the file keeps a plain SHA-256 of the whole key. A slow
hash as scrypt protects secrets that can be guessed; nobody guesses 256 bits, and on a server each request with a wrong
key would buy milliseconds of CPU time with it. The id, which is unique and hashed with the secret, does what a salt
does: no two hashes can be compared or looked up in a table. Keys are therefore only made here, never chosen by people.

The id is no secret: it names the key in the file, in logs and in limits, and finds the one hash to compare with, in
constant time.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from secrets import token_hex, token_urlsafe
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import SettingsError
from shared.runtime.settings import NAME_PATTERN

SHAPE = re.compile(r"wisp-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
NOBODY = sha256(b"").hexdigest()
"""What a key with an unknown id is compared with, so that it takes as long as any other."""

Limit = Annotated[int, Field(ge=1)]


class KeyLimits(BaseModel):
    """What the holder of one key may use, over all gateways; None for no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Prompt and output tokens."""
    max_sessions: Limit | None = None
    """Texts generated at once."""


class ApiKey(KeyLimits):
    """One key as its file keeps it."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """For people: whose key it is."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: datetime
    device: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """The device whose key it is: what is asked with it is drafted there, and nowhere else."""


_FILE = TypeAdapter(list[ApiKey])


def new_key(
    name: str, created: datetime, limits: KeyLimits | None = None, device: str | None = None
) -> tuple[str, ApiKey]:
    """A fresh key, which nobody can show again later, and what the file keeps of it."""
    id_ = token_hex(6)
    text = f"wisp-{id_}-{token_urlsafe(32)}"
    given = (limits or KeyLimits()).model_dump()
    return text, ApiKey(id=id_, name=name, sha256=_digest(text), created=created, device=device, **given)


def parse(text: str, where: str) -> list[ApiKey]:
    """The keys in a file's text, a JSON list. Raises SettingsError that names the file and what is wrong with it."""
    try:
        keys = _FILE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        raise SettingsError(
            f"{where}: {place + ': ' if place else ''}{first['msg']}; `wisp keys new` writes such files"
        ) from None
    for field in ("id", "name"):
        values = [getattr(key, field) for key in keys]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise SettingsError(f"{where}: two keys have the {field} {twice!r}; remove one of them")
    return keys


def render(keys: Iterable[ApiKey]) -> str:
    """The file's text for these keys."""
    return _FILE.dump_json(list(keys), indent=2, exclude_none=True).decode() + "\n"


class KeyRing:
    """The keys that are good now."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, shown: str) -> ApiKey | None:
        """The key that this text is; None if it is none of ours."""
        shape = SHAPE.fullmatch(shown)
        key = self._keys.get(shape[1]) if shape else None
        same = hmac.compare_digest(_digest(shown), key.sha256 if key else NOBODY)
        return key if same else None


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
