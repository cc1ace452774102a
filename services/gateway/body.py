"""The base of all bodies of requests and of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from services.gateway.core.options import UnsupportedOption


def or_default(default: Any) -> BeforeValidator:
    """Treat null as the default, as OpenAI's API does."""
    return BeforeValidator(lambda value: default if value is None else value)


class Body(BaseModel):
    """A body of a request or a part of one: strict; unknown fields are ignored."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = {}
    """Options that are refused by name."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)
