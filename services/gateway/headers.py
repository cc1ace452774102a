"""Our own request headers; an option of the same meaning in the body goes before them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from services.gateway.errors import invalid
from shared.broker.topology import DEFAULT_POOL
from shared.messages import DraftChoice
from shared.runtime.settings import NAME_PATTERN

DRAFT_HEADER = "x-wisp-draft"
POOL_HEADER = "x-wisp-pool"


def draft_of(headers: Mapping[str, str]) -> DraftChoice:
    """The draft source that is asked for. Raises ApiError."""
    text = headers.get(DRAFT_HEADER, DraftChoice.AUTO.value)
    try:
        return DraftChoice(text)
    except ValueError:
        known = ", ".join(choice.value for choice in DraftChoice)
        raise invalid(f"header {DRAFT_HEADER} must be one of {known}, not {text[:60]!r}", DRAFT_HEADER) from None


def pool_of(headers: Mapping[str, str]) -> str:
    """The pool of drafters that is asked for. Raises ApiError."""
    text = headers.get(POOL_HEADER, DEFAULT_POOL)
    if not re.fullmatch(NAME_PATTERN, text):
        allowed = "1 to 64 letters, digits, underscores or dashes"
        raise invalid(f"header {POOL_HEADER} must be {allowed}, not {text[:60]!r}", POOL_HEADER)
    return text
