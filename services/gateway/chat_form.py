"""Bodies of other APIs that become chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from services.gateway.body import Body
from services.gateway.core.options import same
from services.gateway.errors import invalid
from services.gateway.schema import ChatRequest


class ChatForm(Body):
    """A body that becomes a chat. Options of chats that it lacks are refused."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Options of chats that are ignored."""

    @classmethod
    def refuse_unsupported(cls, fields: Mapping[str, Any]) -> None:
        """See `Body.refuse_unsupported`. Options that only chats have are refused, unless they have the default."""
        super().refuse_unsupported(fields)
        checked = cls.model_fields.keys() | cls.unsupported.keys() | cls.without_effect
        for name in fields:
            if name in ChatRequest.model_fields and name not in checked and not _is_default(name, fields[name]):
                text = f"{name} is not supported here; leave it out, or send the request to /v1/chat/completions"
                raise invalid(text, name, "unsupported_parameter")


def _is_default(name: str, value: Any) -> bool:
    """Return whether a value of a chat's option is its default, or null."""
    default = ChatRequest.model_fields[name].get_default(call_default_factory=True, validated_data={})
    if not isinstance(default, BaseModel):
        return value is None or same(value, default)
    try:
        return value is None or type(default).model_validate(value) == default
    except ValidationError:
        return False
