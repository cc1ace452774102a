"""Shows answers in the terminal so that accepted draft tokens and the target's own tokens can be told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

DRAFT_COLOUR = Style(color="green")
DRAFT_PLAIN = Style(underline=True)
OPEN, CLOSE = "‹", "›"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class TextPart:
    """A stretch of text and whether drafting made it."""

    text: str
    draft: bool


def text_parts(delta: str, trace: Mapping[str, Any] | None) -> list[TextPart]:
    """A chunk's text by origin. Text that the trace does not explain counts as the target's own."""
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
    """Text without the control characters by which it could take over the terminal."""
    return _CONTROL.sub("", text)


class Painter:
    """Writes parts as they come: in colour, underlined if colour is not wanted, in marks if there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._marks = not console.is_terminal
        self._style = DRAFT_PLAIN if console.no_color else DRAFT_COLOUR
        self._open = False

    @property
    def legend(self) -> Text:
        """What the difference means."""
        draft = (
            Text(f"{OPEN}accepted draft tokens{CLOSE}") if self._marks else Text("accepted draft tokens", self._style)
        )
        return Text.assemble(draft, ", the target's own tokens")

    def write(self, written: Sequence[TextPart]) -> None:
        """Write some parts, without a line end."""
        for part in written:
            if self._marks and part.draft != self._open:
                self._put(OPEN if part.draft else CLOSE)
                self._open = part.draft
            self._put(printable(part.text), self._style if part.draft and not self._marks else None)

    def text(self, written: Sequence[TextPart]) -> Text:
        """The same as `write` shows, as a text of its own."""
        shown = Text()
        for part in written:
            if part.draft and self._marks:
                shown.append(f"{OPEN}{printable(part.text)}{CLOSE}")
            else:
                shown.append(printable(part.text), self._style if part.draft else None)
        return shown

    def end(self) -> None:
        """End the answer's last line."""
        if self._open:
            self._put(CLOSE)
            self._open = False
        self.console.print()

    def _put(self, text: str, style: Style | None = None) -> None:
        self.console.print(Text(text, style or Style()), end="", soft_wrap=True)
