"""How far a client has its stream: what the id of each of its events says, and what is still to come. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from services.gateway.core.completion import Piece
from services.gateway.errors import ApiError

MOST_TEXTS = 128
_FORM = re.compile(
    r"(?P<name>[A-Za-z0-9-]{1,64})/(?P<texts>(?:\d{1,4}:\d{1,9}:\d{1,9}\.?(?:,\d{1,4}:\d{1,9}:\d{1,9}\.?)*)?)(?P<usage>/u)?"
)


@dataclass(frozen=True)
class Shown:
    """How much of a text: a token may have no characters (it was cut off by a stop string), and an echoed prompt's
    characters no tokens."""

    characters: int = 0
    tokens: int = 0

    def after(self, piece: Piece) -> Shown:
        """With one more piece."""
        return Shown(self.characters + len(piece.text), self.tokens + len(piece.tokens))

    def most(self, other: Shown) -> Shown:
        """The later of two places in one text."""
        return Shown(max(self.characters, other.characters), max(self.tokens, other.tokens))


NOTHING = Shown()


@dataclass
class Place:
    """A place in the stream of the answer `name`.

    As text: `name/0:35:8,1:40:9.` has 35 characters and 8 tokens of the first text, and all of the second, 40 and 9;
    `/u` behind it has the usage as well.
    """

    name: str
    shown: dict[int, Shown] = field(default_factory=dict)
    """By the text's index, of texts that have begun."""
    closed: set[int] = field(default_factory=set)
    """Texts whose last chunk was sent."""
    usage: bool = False

    def __str__(self) -> str:
        texts = ",".join(
            f"{i}:{shown.characters}:{shown.tokens}{'.' if i in self.closed else ''}"
            for i, shown in sorted(self.shown.items())
        )
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
        shown = {int(index): Shown(int(count), int(tokens.rstrip("."))) for index, count, tokens in parts}
        closed = {int(index) for index, _, tokens in parts if tokens.endswith(".")}
        return cls(found["name"], shown, closed, found["usage"] is not None)


def rest_of(piece: Piece, seen: Shown, known: Shown) -> Piece | None:
    """What a client that has `known` of a text lacks of its piece that begins at `seen`; None if nothing."""
    text = piece.text[max(0, known.characters - seen.characters) :]
    tokens = piece.tokens[max(0, known.tokens - seen.tokens) :]
    return replace(piece, text=text, tokens=tokens) if text or tokens else None
