"""How far a client has its stream: what the id of each of its events says, and what is still to come. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.gateway.errors import ApiError
from services.gateway.session import Piece

MOST_TEXTS = 128
_FORM = re.compile(
    r"(?P<name>[A-Za-z0-9-]{1,64})/(?P<texts>(?:\d{1,4}:\d{1,9}\.?(?:,\d{1,4}:\d{1,9}\.?)*)?)(?P<usage>/u)?"
)


@dataclass
class Place:
    """A place in the stream of the answer `name`.

    As text: `name/0:35,1:40.` has 35 characters of the first text and all of the second, 40; `/u` behind it has the
    usage as well.
    """

    name: str
    shown: dict[int, int] = field(default_factory=dict)
    """Characters by the text's index, of texts that have begun."""
    closed: set[int] = field(default_factory=set)
    """Texts whose last chunk was sent."""
    usage: bool = False

    def __str__(self) -> str:
        texts = ",".join(f"{i}:{count}{'.' if i in self.closed else ''}" for i, count in sorted(self.shown.items()))
        return f"{self.name}/{texts}{'/u' if self.usage else ''}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place that an event's id names. Raises ApiError with status 400."""
        found = _FORM.fullmatch(text)
        parts = [part.split(":") for part in found["texts"].split(",") if part] if found else []
        if found is None or len(parts) > MOST_TEXTS:
            raise ApiError(
                400,
                f"Last-Event-ID {text[:100]!r} is no id of an event of this server; send the last `id:` that came",
                code="invalid_event_id",
            )
        shown = {int(index): int(count.rstrip(".")) for index, count in parts}
        closed = {int(index) for index, count in parts if count.endswith(".")}
        return cls(found["name"], shown, closed, found["usage"] is not None)


def rest_of(piece: Piece, known: int) -> Piece | None:
    """What a client that has the first `known` characters of a piece still lacks of it; None if nothing."""
    if known <= 0:
        return piece
    if known >= len(piece.text):
        return None
    tokens = list(piece.tokens)
    passed = len(piece.text) - sum(len(token.text) for token in tokens)  # an echoed prompt
    while tokens and passed < known:
        passed += len(tokens.pop(0).text)
    return replace(piece, text=piece.text[known:], tokens=tokens)


def left_of(known: Mapping[int, int], index: int, seen: int) -> int:
    """Characters of a text's next piece that the client has, when `seen` have passed before it."""
    return known.get(index, 0) - seen
