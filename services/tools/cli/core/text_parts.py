"""An answer's text by origin: accepted draft tokens and copies, or the target's own tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.style import Style
from rich.text import Text

OPEN, CLOSE = "‹", "›"

_COLOUR = Style(color="green")
_UNDERLINE = Style(underline=True)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile(f"{_CONTROL.pattern}|{_SURROGATE.pattern}")


@dataclass(frozen=True)
class TextPart:
    """A stretch of text of one origin."""

    text: str
    draft: bool
    """True if it consists of accepted draft tokens or copies."""


@dataclass(frozen=True)
class DraftStyle:
    """The look of accepted draft tokens: green, underlined on a terminal without colours, else between marks."""

    terminal: bool
    colour: bool

    @property
    def style(self) -> Style:
        """The style of draft tokens; empty where marks replace it."""
        if not self.terminal:
            return Style()
        return _COLOUR if self.colour else _UNDERLINE

    @property
    def legend(self) -> Text:
        """The explanation of the two looks."""
        return Text.assemble(
            self.text([TextPart("accepted draft tokens, and earlier text that the verifier copied", True)]),
            "; the target's own tokens",
        )

    def text(self, parts: Sequence[TextPart]) -> Text:
        """Return parts as terminal text, without control characters."""
        shown = Text()
        for part in parts:
            text = printable(part.text)
            if part.draft and not self.terminal:
                text = f"{OPEN}{text}{CLOSE}"
            shown.append(text, self.style if part.draft else None)
        return shown


def text_parts(delta: str, trace: Mapping[str, Any] | None) -> list[TextPart]:
    """Split a chunk's text by origin. Text that the trace does not cover counts as the target's own."""
    tokens: Sequence[Mapping[str, Any]] = (trace or {}).get("tokens") or []
    if "".join(str(token["text"]) for token in tokens) != delta:
        return [TextPart(delta, False)] if delta else []
    merged: list[TextPart] = []
    for token in tokens:
        text, draft = str(token["text"]), bool(token["draft"])
        if merged and merged[-1].draft == draft:
            merged[-1] = TextPart(merged[-1].text + text, draft)
        elif text:
            merged.append(TextPart(text, draft))
    return merged


def printable(text: str) -> str:
    """Remove control characters, with which a text could control the terminal, and characters that none can show."""
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))


def escaped(json_text: str) -> str:
    """Escape the characters that `printable` removes, so that a reader of the JSON gets them all."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text)


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 token`, `2 tokens`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
