"""Bodies of requests: read, parsed as JSON, checked by a model, and the errors of wrong ones.

Unknown options are ignored, because clients of every age send some (`services.gateway.misspelt`). Options that would
change the text but are not supported (`services.gateway.core.options`) are refused by name.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from services.gateway import misspelt
from services.gateway.core.options import UnsupportedOption
from services.gateway.errors import ApiError, invalid
from services.gateway.settings import ApiSettings
from shared.errors import SHOWN, cut, quoted

ENCODINGS = {"identity": False, "": False, "gzip": True, "x-gzip": True}
"""Encodings of bodies, and whether they are gzip."""
GZIP = 31
"""zlib's number for gzip."""
BLOCK_TAG = "block "
"""Prefix of the tags of a union of blocks. Errors leave such a tag out of an option's path."""


def or_default(default: Any) -> BeforeValidator:
    """Treat null as the default, as OpenAI's API does."""
    return BeforeValidator(lambda value: default if value is None else value)


def as_whole(value: Any) -> Any:
    """Return a number without fraction as an integer: JSON has one kind of number, and some clients send 4.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_limit(value: Any) -> Any:
    whole = as_whole(value)
    return None if whole == -1 and type(whole) is int else whole


Whole = BeforeValidator(as_whole)
Most = BeforeValidator(_as_limit)
"""A token limit; -1 means no limit for llama.cpp's clients."""


class Body(BaseModel):
    """A body of a request or a part of one: strict; unknown fields are ignored."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = {}
    """Options that are refused by name."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)

    @classmethod
    def refuse_unsupported(cls, fields: Mapping[str, Any]) -> None:
        """Raise ApiError for the first unsupported option of a body with these fields."""
        refuse(fields, cls.unsupported)


def refuse(fields: Mapping[str, Any], options: Mapping[str, UnsupportedOption], where: str = "") -> None:
    """Raise ApiError for the first of these options that the fields have. where: begins its name in the error."""
    for name, value in fields.items():
        if (option := options.get(name)) is not None and (advice := option.refusal(value)) is not None:
            text = f"{where}{name} is not supported here; {advice}"
            raise invalid(text, f"{where}{name}", "unsupported_parameter")


async def read_body(settings: ApiSettings, request: Request) -> bytes:
    """Read a request's body, and decompress it. It is refused as soon as it is known to be too long."""
    limit, timeout_s = settings.max_body_bytes, settings.body_timeout_s
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ENCODINGS:
        text = f"the request's body has the encoding {quoted(encoding)}; send it as gzip, or without compression"
        refused = {"accept-encoding": "gzip, identity"}
        raise ApiError(415, text, code="unsupported_content_encoding", extra=refused)
    unpack = zlib.decompressobj(GZIP) if ENCODINGS[encoding] else None

    def too_large() -> ApiError:
        return ApiError(413, f"the request's body is longer than {limit} bytes", code="request_too_large")

    if (length := request.headers.get("content-length", "")).isdecimal() and int(length[:20]) > limit:
        raise too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                # At most one byte more than is allowed, however far the rest would unpack.
                body += part if unpack is None else unpack.decompress(part, limit + 1 - len(body))
                if len(body) > limit:
                    raise too_large()
    except TimeoutError:
        raise ApiError(408, f"the request's body did not arrive in {timeout_s:g} s", code="request_timeout") from None
    except zlib.error:
        raise invalid("the request's body cannot be unpacked as gzip", code="invalid_encoding") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away before it had sent its request") from None
    if unpack is not None and not unpack.eof:
        raise invalid("the request's body ends within its gzip data", code="invalid_encoding")
    return bytes(body)


R = TypeVar("R", bound=Body)


def parse(kind: type[R], body: bytes) -> R:
    """Parse a request's body. Raises ApiError with status 400 that names the option and the problem."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the request's body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise invalid(f"the request's body must be a JSON object, not {_kind(fields)}", code="invalid_json")
    kind.refuse_unsupported(fields)
    parsed = checked(kind, fields)
    if not _is_finite(fields):  # somewhere in a schema, a call's input or the like
        raise invalid("the request's body is not JSON: number out of range", code="invalid_json")
    if unknown := [name for name in fields if name not in kind.model_fields and name not in kind.unsupported]:
        misspelt.note(unknown, fields, kind.model_fields)
    return parsed


def checked(kind: type[R], fields: Mapping[str, Any]) -> R:
    """Return the body with these fields. Raises ApiError with status 400 that names the option and the problem."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from error


def _is_finite(value: Any) -> bool:
    """Return whether all numbers of parsed JSON are finite: the parser reads 1e400 as infinity, which is no JSON."""
    if isinstance(value, float):
        return isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_finite(one) for one in inner if not isinstance(one, str | int))


def _explain(error: ValidationError) -> ApiError:
    """Return the error of a body that its model refuses, with the option that is wrong."""
    # A union reports an error per branch; the one that got furthest is the one that the client meant.
    # Of several errors in one object, a wrong type is the cause of the others.
    errors = error.errors(include_url=False)
    first = max(errors, key=lambda problem: (len(problem["loc"]), problem["loc"][-1:] == ("type",)))
    path = _path(first["loc"])
    if first["type"] == "unknown_option":
        option = f"{path}.{first['ctx']['option']}"
        text = f"there is no option {cut(option, SHOWN)}; `{path}` has {first['ctx']['known']}"
        return invalid(text, option, "unknown_parameter")
    if first["type"] == "block_type":
        path += ".type"
        first["input"] = first["input"].get("type") if isinstance(first["input"], dict) else first["input"]
    if first["type"] == "missing":
        return invalid(f"{path} is missing", path, "missing_required_parameter")
    if not path:  # an error of several options together begins with the name of one
        path, _, text = first["msg"].partition(": ")
        return invalid(f"{path}: {text}", path)
    value = first["input"]
    given = f" (given: {quoted(value)})" if isinstance(value, str | int | float) else f" (given: {_kind(value)})"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return invalid(f"{path}: {first['msg']}{given}", path, code)


def _path(steps: tuple[int | str, ...]) -> str:
    """Return the client's path to an option."""
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in ("str", "int") or step.startswith(("list[", "function-", "constrained-", BLOCK_TAG)):
            continue  # a branch of a union, which is no part of the client's path
        else:
            path += f".{step}" if path else step
    return path


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
