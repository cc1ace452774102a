"""The rounds of one answer as the client saw them, and a picture of their times and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.style import Style
from rich.text import Text

from services.tools.cli.core.text_parts import DraftStyle, TextPart

BAR = 32
"""Columns of the longest bar."""
PHASES = (("draft", "▒", "green"), ("queue and messages", "░", "yellow"), ("verify", "█", "blue"))
BEYOND = "…"


@dataclass(frozen=True)
class Arrival:
    """A chunk's trace and the time of its arrival, counted from sending the request."""

    at_ms: float
    trace: Mapping[str, Any]


@dataclass(frozen=True)
class AnswerRound:
    """One round or report of a run, as the client received it."""

    number: int
    total_ms: float
    """Since the previous round, or since the request was sent."""
    draft_ms: float
    queue_ms: float
    verify_ms: float
    verified: int
    accepted: int
    tokens: tuple[TextPart, ...]
    run: bool = False
    """True for tokens that the verifier decoded by itself."""

    @property
    def outside_ms(self) -> float:
        """Time outside drafting and verifying: the scheduler's queue, messages, commit, HTTP."""
        return max(0.0, self.total_ms - self.draft_ms - self.verify_ms)


def rounds_of(arrivals: Sequence[Arrival]) -> list[AnswerRound]:
    """Return the rounds that the chunks of one completion report.

    Rounds that arrive in one chunk share equally the time that their own measurements do not cover.
    """
    tokens = [token for arrival in arrivals for token in arrival.trace.get("tokens") or []]
    rounds = []
    before_ms = 0.0
    for arrival in arrivals:
        reported = arrival.trace.get("rounds") or []
        known_ms = [one["draft_ms"] + one["verify_ms"] for one in reported]
        for one, ms in zip(reported, known_ms, strict=True):
            own = tokens[one["start"] : one["start"] + one["tokens"]]
            rounds.append(
                AnswerRound(
                    number=one["round"],
                    total_ms=ms + max(0.0, arrival.at_ms - before_ms - sum(known_ms)) / len(reported),
                    draft_ms=one["draft_ms"],
                    queue_ms=one["queue_ms"],
                    verify_ms=one["verify_ms"],
                    verified=one["verified"],
                    accepted=one["accepted"],
                    tokens=tuple(TextPart(str(token["text"]), bool(token["draft"])) for token in own),
                    run=bool(one.get("run")),
                )
            )
        if reported:
            before_ms = arrival.at_ms
    return rounds


def picture(rounds: Sequence[AnswerRound], style: DraftStyle) -> list[Text]:
    """Draw a legend, which fits 80 columns, and one line per round or report of a run.

    A line has the round's number or `run`, milliseconds, a bar to scale, the tokens, and the rejected drafts.

    The scale fits the longest round except the first, which includes the prefill of the prompt. A longer bar is cut.
    """
    if not rounds:
        return []
    column_ms = _round_up(max(one.total_ms for one in rounds[1:] or rounds) / BAR)
    legend = Text("  rounds: ")
    for i, (name, glyph, colour) in enumerate(PHASES):
        legend.append(", " if i else "").append(glyph, _style(style, colour)).append(f" {name}")
    lines = [legend.append(f"; one column is {column_ms:g} ms")]
    if any(one.run for one in rounds):
        lines.append(Text("  run: tokens that the verifier made alone, between two reports"))
    for one in rounds:
        label = "run" if one.run else str(one.number)
        line = Text.assemble(f"  {label:>3} {one.total_ms:>6,.0f} ms ", _bar(one, column_ms, style), " ")
        line.append_text(style.text([TextPart(part.text.replace("\n", "⏎"), part.draft) for part in one.tokens]))
        if one.verified > one.accepted:
            line.append(f"  {one.verified - one.accepted} rejected", "dim")
        lines.append(line)
    return lines


def _bar(one: AnswerRound, column_ms: float, style: DraftStyle) -> Text:
    bar = Text()
    end_ms = 0.0
    for (_, glyph, colour), ms in zip(PHASES, (one.draft_ms, one.outside_ms, one.verify_ms), strict=True):
        end_ms += ms
        # Ends are rounded, not lengths, so that the bar as a whole is to scale.
        bar.append(glyph * (round(end_ms / column_ms) - len(bar)), _style(style, colour))
    if len(bar) > BAR:
        bar = bar[: BAR - 1].append(BEYOND)
    return bar.append(" " * (BAR - len(bar)))


def _style(style: DraftStyle, colour: str) -> Style:
    return Style(color=colour) if style.colour else Style()


def _round_up(ms: float) -> float:
    """Round up to the next of 1, 2, 5, 10, 20, 50 and so on."""
    power = 10.0 ** math.floor(math.log10(max(ms, 0.1)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= ms * (1 - 1e-9))
