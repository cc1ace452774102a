"""Writes answers and their rounds to the terminal, with draft tokens highlighted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

from services.tools.cli.core.answer_rounds import AnswerRound, picture
from services.tools.cli.core.text_parts import CLOSE, OPEN, DraftStyle, TextPart, printable

ROUNDS_SHOWN = 8


class Painter:
    """Writes the parts of an answer as they arrive."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.style = DraftStyle(terminal=console.is_terminal, colour=not console.no_color)
        self._open = False

    def write(self, parts: Sequence[TextPart]) -> None:
        """Write parts without a line end."""
        for part in parts:
            if not self.style.terminal and part.draft != self._open:
                self._put(OPEN if part.draft else CLOSE)
                self._open = part.draft
            self._put(printable(part.text), self.style.style if part.draft else None)

    def end(self) -> None:
        """End the answer's last line."""
        if self._open:
            self._put(CLOSE)
            self._open = False
        self.console.print()

    def draw_rounds(self, rounds: Sequence[AnswerRound], limit: int = ROUNDS_SHOWN) -> None:
        """Draw the first rounds of an answer, reports of runs included, and count the others."""
        for line in picture(rounds[:limit], self.style):
            self.console.print(line, no_wrap=True, overflow="ellipsis", crop=self.console.is_terminal)
        runs = sum(one.run for one in rounds[limit:])
        counts = (
            (len(rounds[limit:]) - runs, "more round", "more rounds"),
            (runs, "more report of a run", "more reports of runs"),
        )
        if len(rounds) > limit:
            left = " and ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts if count)
            self.console.print(Text(f"  and {left}", "dim"))

    def _put(self, text: str, style: Style | None = None) -> None:
        self.console.print(Text(text, style or Style()), end="", soft_wrap=True)
