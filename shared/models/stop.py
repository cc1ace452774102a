"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first completed stop string, and withholds only text that could still become one.

    The outcome does not depend on how the text is split into pieces: the stop string that ends first
    wins, and the longest of those that end at the same character. Each character costs amortised O(1) per stop
    string (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = [_Prefix(stop) for stop in stops]
        self._held = ""
        self.hit: str | None = None
        """The stop string found, if any."""

    def feed(self, text: str, *, ends: bool = True) -> tuple[str, str | None]:
        """Add a piece of text; return the text that may be shown, and the stop string found or None.

        Text after a stop string is dropped. ends: False to ignore stop strings that end in this piece.
        """
        if self.hit is not None:
            return "", self.hit
        if not self._stops:
            return text, None
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [stop.text for stop in self._stops if stop.extend(character)]
            if complete and ends:
                self.hit = max(complete, key=len)
                self._held = ""
                return pending[: end - len(self.hit)], self.hit
        shown = len(pending) - max((stop.length for stop in self._stops), default=0)
        self._held = pending[shown:]
        return pending[:shown], None

    def flush(self) -> str:
        """Return the withheld text, to be shown when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


class _Prefix:
    """Length of a stop string's prefix at the end of the text so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        # _borders[n]: length of the longest proper prefix of text[: n + 1] that is also its suffix.
        self._borders = [0]
        for character in text[1:]:
            border = self._borders[-1]
            while border and text[border] != character:
                border = self._borders[border - 1]
            self._borders.append(border + (text[border] == character))

    def extend(self, character: str) -> bool:
        """Add the next character; return whether the text now ends with the whole stop string."""
        if self.length == len(self.text):  # it ended with one before, which was ignored
            self.length = self._borders[-1]
        while self.length and self.text[self.length] != character:
            self.length = self._borders[self.length - 1]
        self.length += self.text[self.length] == character
        return self.length == len(self.text)
