"""A session's text in the tokens of a draft model with another vocabulary, kept up to date round by round."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from services.drafter.core.translation import Translation
from shared.grammar.vocabulary import inside

WINDOW = 16
"""Last draft tokens that may change when text is added; most tokenizers change only those of the last word."""
AGREEING = 2
"""Tokens at the beginning of the window that have to stay the same; otherwise the whole text is tokenized again."""
_BLANK = b" \n\t"


class OwnTokens:
    """The draft model's tokens of a session.

    The text is that of the target's tokens. The target's control tokens become the draft model's where it has the same
    ones or both end a text, and nothing elsewhere. The target's tokens come one after the other; where others take
    their place, all is translated again.
    """

    def __init__(self, translation: Translation) -> None:
        self._translation = translation
        self._reset()

    def _reset(self) -> None:
        self._seen: list[int] = []
        self._done: list[int] = list(self._translation.draft.begin)
        """Draft tokens of the text up to the last control token."""
        self._text = bytearray()
        """The text from there on, in whole characters."""
        self._ids: list[int] = []
        """Its draft tokens."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def tokens(self) -> list[int]:
        """The draft tokens of the session's text, but for the bytes of a character that is not complete."""
        return self._done + self._ids

    @property
    def partial(self) -> bytes:
        """The bytes of a character at the end that is not complete."""
        return self._utf8.getstate()[0]

    def begun(self) -> tuple[int, ...]:
        """Return the target's last tokens for which the draft model may have a longer token.

        They are those of an incomplete character, or else of the last draft token; none if their bytes do not agree.
        """
        if not (piece := self.partial):
            if not self._ids:
                return ()
            piece = self._translation.draft.vocabulary.token_bytes(self._ids[-1])
        words = self._translation.target.vocabulary
        count, left = 0, piece
        while left and count < len(self._seen):
            last = words.token_bytes(self._seen[-1 - count])
            if not last or not left.endswith(last):
                return ()
            left = left[: len(left) - len(last)]
            count += 1
        return () if left or not count else tuple(self._seen[-count:])

    def follow(self, tokens: Sequence[int]) -> None:
        """Take the session's tokens, which continue those of the last call or replace them."""
        if list(tokens[: len(self._seen)]) != self._seen:
            self._reset()
        begin = self._translation.draft.begin
        words, added = self._translation.target.vocabulary, bytearray()
        for at in range(len(self._seen), len(tokens)):
            token = tokens[at]
            if (control := self._translation.controls.get(token)) is None:
                added += words.token_bytes(token)
            elif control and not (at == 0 and begin):
                self._add(added, final=True)
                self._done += [*self._ids, *control]
                self._text, self._ids, added = bytearray(), [], bytearray()
            self._seen.append(token)
        self._add(added, final=False)

    def _add(self, added: bytearray, *, final: bool) -> None:
        """Add bytes to the text. final: no bytes complete the last character."""
        text = self._utf8.decode(bytes(added), final).encode()
        if text:
            before = len(self._text)
            self._text += text
            self._tokenize(before)

    def _tokenize(self, before: int) -> None:
        """Tokenize the text, of which the first `before` bytes are tokenized already."""
        vocabulary = self._translation.draft.vocabulary
        kept, start = self._window(before)
        if kept:
            old = self._ids[kept : kept + AGREEING]
            new = inside(bytes(self._text[start:]), vocabulary.encode_plain, vocabulary.token_bytes)
            if new is not None and new[: len(old)] == old:
                self._ids[kept:] = new
                return
        self._ids = vocabulary.encode_plain(self._text.decode())

    def _window(self, before: int) -> tuple[int, int]:
        """Return how many tokens stay, and where in the text those behind them begin; 0 to tokenize all of it.

        They begin with the first blank between two words, which separates tokens in most tokenizers.
        """
        piece = self._translation.draft.vocabulary.token_bytes
        at = before
        for index in range(len(self._ids) - 1, -1, -1):
            token = piece(self._ids[index])
            if self._text[max(0, at - len(token)) : at] != token:
                break  # the tokenizer changes the text
            at -= len(token)
            old_enough = len(self._ids) - index >= WINDOW
            if old_enough and at > 0 and self._text[at] in _BLANK and self._text[at - 1] not in _BLANK:
                return index, at
        return 0, 0
