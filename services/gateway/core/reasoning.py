"""Reasoning in answers: the text between `<think>` and `</think>` that a model writes before its answer."""

from __future__ import annotations

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

    def __init__(self, *, is_open: bool, marked: bool = True) -> None:
        """is_open: the prompt ends within the reasoning. marked: False if the text has no reasoning."""
        self._state = "reasoning" if is_open else "start" if marked else "content"

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
