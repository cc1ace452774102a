"""One answer's rounds as a picture in the terminal: how long each took for what, and the tokens that it brought."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.style import Style
from rich.text import Text

from services.tools.cli.paint import Painter, TextPart

SHOWN = 8
BAR = 32
"""Columns of the longest bar."""
PARTS = (("draft", "▒", "green"), ("queue and messages", "░", "yellow"), ("verify", "█", "blue"))
BEYOND = "…"


@dataclass(frozen=True)
class Arrival:
    """A chunk's trace, and when the client got it, counted from sending the request."""

    at_ms: float
    trace: Mapping[str, Any]


@dataclass(frozen=True)
class AnswerRound:
    """One round as the client saw it."""

    number: int
    total_ms: float
    """Since the round before it, or since the request was sent."""
    draft_ms: float
    queue_ms: float
    verify_ms: float
    verified: int
    accepted: int
    tokens: tuple[TextPart, ...]

    @property
    def outside_ms(self) -> float:
        """Neither drafting nor verifying: waiting in the scheduler's pool, messages, commit, HTTP."""
        return max(0.0, self.total_ms - self.draft_ms - self.verify_ms)


def rounds_of(arrivals: Sequence[Arrival]) -> list[AnswerRound]:
    """The rounds that the chunks of one text tell of. Rounds whose text came in one chunk took the same time each,
    apart from what is known of them."""
    tokens = [token for arrival in arrivals for token in arrival.trace.get("tokens") or []]
    rounds = []
    before_ms = 0.0
    for arrival in arrivals:
        told = arrival.trace.get("rounds") or []
        known_ms = [one["draft_ms"] + one["verify_ms"] for one in told]
        for one, ms in zip(told, known_ms, strict=True):
            shown = tokens[one["start"] : one["start"] + one["tokens"]]
            rounds.append(
                AnswerRound(
                    number=one["round"],
                    total_ms=ms + max(0.0, arrival.at_ms - before_ms - sum(known_ms)) / len(told),
                    draft_ms=one["draft_ms"],
                    queue_ms=one["queue_ms"],
                    verify_ms=one["verify_ms"],
                    verified=one["verified"],
                    accepted=one["accepted"],
                    tokens=tuple(TextPart(str(token["text"]), bool(token["draft"])) for token in shown),
                )
            )
        if told:
            before_ms = arrival.at_ms
    return rounds


def draw(rounds: Sequence[AnswerRound], painter: Painter, limit: int = SHOWN) -> None:
    """Print the first rounds of an answer."""
    for line in picture(rounds[:limit], painter):
        painter.console.print(line, no_wrap=True, overflow="ellipsis", crop=painter.console.is_terminal)
    if len(rounds) > limit:
        painter.console.print(Text(f"  and {len(rounds) - limit} more rounds", "dim"))


def picture(rounds: Sequence[AnswerRound], painter: Painter) -> list[Text]:
    """A line for each round: its number, milliseconds, a bar to scale, its tokens and how many drafts were rejected.

    The scale fits the longest round but the first, which reads the whole prompt; a longer bar is cut.
    """
    if not rounds:
        return []
    column_ms = _round_up(max(one.total_ms for one in rounds[1:] or rounds) / BAR)
    legend = Text("  rounds: ")
    for i, (name, glyph, colour) in enumerate(PARTS):
        legend.append(", " if i else "").append(glyph, _style(painter, colour)).append(f" {name}")
    lines = [legend.append(f"; one column is {column_ms:g} ms")]
    for one in rounds:
        line = Text.assemble(f"  {one.number:>3} {one.total_ms:>6,.0f} ms ", _bar(one, column_ms, painter), " ")
        line.append_text(painter.text([TextPart(part.text.replace("\n", "⏎"), part.draft) for part in one.tokens]))
        if one.verified > one.accepted:
            line.append(f"  {one.verified - one.accepted} rejected", "dim")
        lines.append(line)
    return lines


def _bar(one: AnswerRound, column_ms: float, painter: Painter) -> Text:
    bar = Text()
    end_ms = 0.0
    for (_, glyph, colour), ms in zip(PARTS, (one.draft_ms, one.outside_ms, one.verify_ms), strict=True):
        end_ms += ms
        # Ends are rounded, not lengths, so that the bar as a whole is to scale.
        bar.append(glyph * (round(end_ms / column_ms) - len(bar)), _style(painter, colour))
    if len(bar) > BAR:
        bar = bar[: BAR - 1].append(BEYOND)
    return bar.append(" " * (BAR - len(bar)))


def _style(painter: Painter, colour: str) -> Style:
    return Style() if painter.console.no_color else Style(color=colour)


def _round_up(ms: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 and so on."""
    power = 10.0 ** math.floor(math.log10(max(ms, 0.1)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= ms * (1 - 1e-9))
