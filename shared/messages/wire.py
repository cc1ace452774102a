"""Messages as bytes: msgpack maps with the type name and the schema version."""

from __future__ import annotations

import msgpack
from pydantic import ValidationError

from shared.errors import MessageError
from shared.messages.fields import Message
from shared.messages.pool import CostModel, DrafterHeartbeat, Heartbeat, Load, Sample
from shared.messages.rounds import Batch, Cancel, Ended, Generate, Halt, HiddenStates, Release, Result, Verify

SCHEMA_VERSION = 1

MESSAGES: dict[str, type[Message]] = {
    kind.type_name: kind
    for kind in (
        Generate,
        Verify,
        Batch,
        Release,
        Halt,
        Result,
        HiddenStates,
        Sample,
        CostModel,
        Load,
        Cancel,
        Ended,
        Heartbeat,
        DrafterHeartbeat,
    )
}


def encode(message: Message) -> bytes:
    """Return the message as bytes for the wire."""
    fields = message.model_dump(exclude_defaults=True)
    fields["t"] = message.type_name
    fields["v"] = SCHEMA_VERSION
    return msgpack.packb(fields)  # type: ignore[no-any-return]


def decode(body: bytes) -> Message:
    """Return the message in these bytes.

    Raises MessageError when they are not msgpack, no known message, or a field is missing or ill-typed.
    """
    try:
        fields = msgpack.unpackb(body)
    except Exception as error:  # msgpack raises half a dozen unrelated types, ValueError and its own among them
        raise MessageError(f"not msgpack: {error or type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise MessageError(f"expected a msgpack map, got {type(fields).__name__}")
    name = fields.pop("t", None)
    kind = MESSAGES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MessageError(f"unknown message type {name!r}; known: {', '.join(MESSAGES)}")
    version = fields.pop("v", None)
    if not isinstance(version, int) or version < 1:
        raise MessageError(f"{name}: schema version {version!r} is not a positive integer")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg']}" for e in error.errors()[:5])
        raise MessageError(f"{name}: {problems}") from error
