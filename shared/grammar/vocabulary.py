"""A model's vocabulary as llguidance reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Protocol

_MARK = b"\x02"
"""A character that begins no word."""
MOST_TEXTS = 4096
"""Forced texts whose tokens are kept: those of a schema's keys are the same in all sessions."""


class Vocabulary(Protocol):
    """The part of `shared.models.text.Tokenizer` that masks need."""

    special_tokens: dict[str, int]

    def token_bytes(self, token: int) -> bytes:
        """Return the token's bytes in a text."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text without control tokens."""


class GrammarVocabulary:
    """A vocabulary as llguidance reads it. A token without bytes is never allowed."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = sorted(
            {token for token in vocabulary.special_tokens.values() if token < vocab_size} | set(eos_ids)
        )
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocab_size)]
        self._inside = lru_cache(MOST_TEXTS)(self._inside_answer)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text inside an answer."""
        return list(self._inside(text.encode() if isinstance(text, str) else text))

    def _inside_answer(self, body: bytes) -> Sequence[int]:
        # SentencePiece puts a space before each text; behind another character it does not.
        for before in (b"", _MARK):
            ids = self._vocabulary.encode_plain((before + body).decode("utf-8", "replace"))
            if (inside := self._after(ids, before)) is not None and self._bytes(inside) == body:
                return inside
        return self._greedy(body)

    def _after(self, ids: list[int], before: bytes) -> list[int] | None:
        """Return the tokens behind the text `before`; None if it does not end with a token."""
        if not before:
            return ids
        ends = (at for at in range(1, len(ids) + 1) if self._bytes(ids[:at]).endswith(before))
        end = next(ends, None)
        return None if end is None else ids[end:]

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids if token < len(self.tokens))

    def _greedy(self, body: bytes) -> list[int]:
        """Return the longest token at each place of a text that the tokenizer changes."""
        ids = []
        while body:
            lengths = range(min(len(body), self._longest), 0, -1)
            found = next(((self._by_bytes[body[:n]], n) for n in lengths if body[:n] in self._by_bytes), None)
            if found is None:
                break
            ids.append(found[0])
            body = body[found[1] :]
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {piece: token for token, piece in reversed(list(enumerate(self.tokens))) if piece}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens))
