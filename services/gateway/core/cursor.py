"""Stream cursors: the id of a stream's event, and the rest of a completion after it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from services.gateway.core.completion import Piece
from services.gateway.errors import ApiError
from shared.errors import quoted

MAX_COMPLETIONS = 128
_FORM = re.compile(
    r"(?P<answer_id>[A-Za-z0-9-]{1,64})/"
    r"(?P<completions>(?:\d{1,4}:\d{1,9}:\d{1,9}\.?(?:,\d{1,4}:\d{1,9}:\d{1,9}\.?)*)?)(?P<usage>/u)?"
)


@dataclass(frozen=True)
class Delivered:
    """The part of a completion that the client has.

    Characters and tokens are counted apart: a token cut off by a stop string has no characters, and the characters of
    an echoed prompt have no tokens.
    """

    characters: int = 0
    tokens: int = 0

    def after(self, piece: Piece) -> Delivered:
        """Return the state after one more piece."""
        return Delivered(self.characters + len(piece.text), self.tokens + len(piece.tokens))

    def most(self, other: Delivered) -> Delivered:
        """Return the later of two states of one completion."""
        return Delivered(max(self.characters, other.characters), max(self.tokens, other.tokens))


NOTHING = Delivered()


@dataclass
class StreamCursor:
    """A position in the stream of an answer.

    As text, `ID/0:35:8,1:40:9.` means 35 characters and 8 tokens of completion 0, and all of completion 1 with its 40
    characters and 9 tokens. A trailing `/u` means that the usage chunk was sent as well.
    """

    answer_id: str
    delivered: dict[int, Delivered] = field(default_factory=dict)
    """By index, for the completions that have begun."""
    closed: set[int] = field(default_factory=set)
    """Completions whose last chunk was sent."""
    usage: bool = False

    def __str__(self) -> str:
        completions = ",".join(
            f"{i}:{delivered.characters}:{delivered.tokens}{'.' if i in self.closed else ''}"
            for i, delivered in sorted(self.delivered.items())
        )
        return f"{self.answer_id}/{completions}{'/u' if self.usage else ''}"

    @classmethod
    def parse(cls, text: str) -> StreamCursor:
        """Parse the id of an event. Raises ApiError with status 400."""
        found = _FORM.fullmatch(text)
        parts = [part.split(":") for part in found["completions"].split(",") if part] if found else []
        if found is None or len(parts) > MAX_COMPLETIONS:
            raise ApiError(
                400,
                f"Last-Event-ID {quoted(text)} is no event id of this server; send the last `id:` that you received",
                code="invalid_event_id",
            )
        delivered = {int(index): Delivered(int(count), int(tokens.rstrip("."))) for index, count, tokens in parts}
        closed = {int(index) for index, _, tokens in parts if tokens.endswith(".")}
        return cls(found["answer_id"], delivered, closed, found["usage"] is not None)


def rest_of(piece: Piece, seen: Delivered, known: Delivered) -> Piece | None:
    """Return the part of a piece that the client lacks; None if it has all of it.

    The piece starts at `seen`; the client has the completion up to `known`.
    """
    if seen.characters >= known.characters and seen.tokens >= known.tokens:
        return piece if piece.text or piece.tokens else None
    text = piece.text[max(0, known.characters - seen.characters) :]
    tokens = piece.tokens[max(0, known.tokens - seen.tokens) :]
    return replace(piece, text=text, tokens=tokens) if text or tokens else None
