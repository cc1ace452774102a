"""Reasoning in answers: the text between `<think>` and `</think>` that a model writes before its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"
TAGS = (OPEN, CLOSE)


@dataclass(frozen=True)
class SplitText:
    """A part of an answer, without tags."""

    reasoning: str
    content: str


class ReasoningSplitter:
    """Splits one answer's text, which comes in pieces that cut no tag.

    The reasoning begins with the text, or before it where the prompt has opened it. It ends with the first closing tag,
    and all later text is content.
    """

    def __init__(self, *, is_open: bool) -> None:
        """is_open: the prompt ends within the reasoning."""
        self._state = "reasoning" if is_open else "start"

    @property
    def ended(self) -> bool:
        """True if no more reasoning can follow."""
        return self._state == "content"

    def feed(self, text: str) -> SplitText:
        """Split the next piece."""
        reasoning = content = ""
        if self._state == "start":
            begun = text.lstrip()
            if begun.startswith(OPEN):
                text, self._state = begun.removeprefix(OPEN), "reasoning"
            elif begun:
                self._state = "content"
            else:
                return SplitText("", text)
        if self._state == "reasoning":
            reasoning, closed, text = text.partition(CLOSE)
            if closed:
                self._state = "content"
        if self._state == "content":
            content = text
        return SplitText(reasoning, content)


class ReasoningCounter:
    """Counts the tokens of one answer's reasoning, without its tags."""

    def __init__(self, *, is_open: bool) -> None:
        """is_open: the prompt ends within the reasoning."""
        self._splitter = ReasoningSplitter(is_open=is_open)
        self.tokens = 0

    def add(self, texts: Sequence[str]) -> None:
        """Count the tokens of the next piece, which have these texts. A token that also has other text counts."""
        if self._splitter.ended:
            return
        piece = "".join(texts)
        split = self._splitter.feed(piece)
        end = len(piece) - (len(CLOSE) + len(split.content) if self._splitter.ended else 0)
        begin, at = end - len(split.reasoning), 0
        for text in texts:
            # A token without text is one of several that make a character.
            self.tokens += max(at, begin) < min(at + max(len(text), 1), end)
            at += len(text)
