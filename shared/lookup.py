"""Prompt lookup: a session's next tokens, copied from an earlier place of the same text that reads like its end.

It costs next to nothing and needs no model. It pays where a text repeats its prompt or itself: edits, code, summaries.
Pure: no I/O, no clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LONGEST_MATCH = 32
"""Most tokens before a copy that are compared. In texts of SmolLM2-135M-Instruct a copy's first token is right after
0.2, 0.4 and 0.6 of the matches of 1, 2 and 3 tokens, after 0.85 of those of 4 to 11, and after 0.96 of longer ones."""
CODE = "I"
WIDTH = array(CODE).itemsize
"""Bytes of a token."""


class LookupText:
    """A growing token sequence that finds where its end has occurred before."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // WIDTH

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the tokens of the whole sequence that are new. A sequence that became shorter is cut."""
        del self._bytes[len(tokens) * WIDTH :]
        self._bytes += array(CODE, tokens[len(self) :]).tobytes()

    def continuation(self, length: int, drafted: Sequence[int] = ()) -> tuple[list[int], int]:
        """Return `length` tokens that followed where the end of the sequence and `drafted` occurred before.

        Of all earlier places that one is taken before which most tokens match, then the latest. Returns the number of
        matching tokens too, at most `LONGEST_MATCH`; without a match: no tokens and 0. A copy that reaches the end
        continues with its own tokens, so that a repeating pattern goes on.
        """
        text = bytes(self._bytes) + array(CODE, drafted).tobytes()
        total = len(text) // WIDTH
        end, matched = 0, 0
        while length > 0 and matched < min(LONGEST_MATCH, total - 1):
            longer = _last_end(text, text[(total - matched - 1) * WIDTH :])
            if longer == 0:
                break
            end, matched = longer, matched + 1
            while matched < min(LONGEST_MATCH, end) and _token(text, end - matched - 1) == _token(
                text, total - matched - 1
            ):
                matched += 1
        if not matched:
            return [], 0
        known = array(CODE)
        known.frombytes(text[end * WIDTH : min(total, end + length) * WIDTH])
        return [known[i % len(known)] for i in range(length)], matched


def _last_end(text: bytes, sought: bytes) -> int:
    """Return the position after the last occurrence of these tokens that ends before the text's end; 0 without one."""
    stop = len(text) - WIDTH
    while (at := text.rfind(sought, 0, stop)) >= 0:
        if at % WIDTH == 0:
            return (at + len(sought)) // WIDTH
        stop = at + len(sought) - 1
    return 0


def _token(text: bytes, position: int) -> bytes:
    return text[position * WIDTH : (position + 1) * WIDTH]
