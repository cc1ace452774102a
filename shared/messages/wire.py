"""Messages as bytes: msgpack maps with the type name and the schema version.

Several results with the same receivers travel as one map: the first, with the others under `more`. A reader of the
version before takes the first and ignores the rest, so only sessions whose gateway and drafter read groups have results
in one (`RoundFields.grouped`).

During an update, an older process may still read such a session's results. A gateway that collects a dead gateway's
streams then reads the missing tokens from Redis. A scheduler that takes over gives up batches without results, so their
rounds are sent again. An older `wisp top` counts the first result of a group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
from pydantic import ValidationError

from shared.errors import MessageError
from shared.messages.fields import Message
from shared.messages.pool import CostModel, DrafterHeartbeat, Heartbeat, Load, Sample
from shared.messages.rounds import Batch, Cancel, Ended, Generate, Halt, HiddenStates, Release, Result, Verify

SCHEMA_VERSION = 1
MORE = "more"
"""Key of the other messages of a group."""

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
    return msgpack.packb(_fields(message))  # type: ignore[no-any-return]


def encode_group(messages: Sequence[Message]) -> bytes:
    """Return at least one message as the bytes of one."""
    first, *others = map(_fields, messages)
    return msgpack.packb({**first, MORE: others} if others else first)  # type: ignore[no-any-return]


def decode(body: bytes) -> Message:
    """Return the message in these bytes, or the first of a group.

    Raises MessageError when they are not msgpack, no known message, or a field is missing or ill-typed.
    """
    return _message(_unpacked(body))


def decode_group(body: bytes) -> list[Message]:
    """Return the messages in these bytes: one, or those of a group. Raises MessageError if one of them is bad."""
    return [_message(fields) for fields in _ungrouped(_unpacked(body))]


def ungroup(body: bytes) -> list[bytes]:
    """Return the bytes of each message of a group; those of any other message as they are, whatever they are."""
    try:
        group = _ungrouped(_unpacked(body))
    except MessageError:
        return [body]
    return [body] if len(group) == 1 else [msgpack.packb(fields) for fields in group]


def _fields(message: Message) -> dict[str, Any]:
    fields = message.model_dump(exclude_defaults=True)
    fields["t"] = message.type_name
    fields["v"] = SCHEMA_VERSION
    return fields


def _ungrouped(fields: dict[Any, Any]) -> list[dict[Any, Any]]:
    others = fields.get(MORE, [])
    if not isinstance(others, list) or not all(isinstance(one, dict) for one in others):
        raise MessageError(f"`{MORE}` must be a list of maps")
    return [{key: value for key, value in fields.items() if key != MORE}, *others] if others else [fields]


def _unpacked(body: bytes) -> dict[Any, Any]:
    try:
        fields = msgpack.unpackb(body)
    except Exception as error:  # msgpack raises half a dozen unrelated types, ValueError and its own among them
        raise MessageError(f"not msgpack: {error or type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise MessageError(f"expected a msgpack map, got {type(fields).__name__}")
    return fields


def _message(fields: dict[Any, Any]) -> Message:
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
