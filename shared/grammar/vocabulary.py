"""A model's vocabulary as llguidance reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def inside(body: bytes, encode: Callable[[str], list[int]], piece: Callable[[int], bytes]) -> list[int] | None:
    """Return the tokens of a text inside another text; None if the tokenizer changes the text.

    encode: returns the tokens of a text by itself. piece: returns a token's bytes.
    """
    # SentencePiece puts a space before each text; behind another character it does not.
    for before in (b"", _MARK):
        ids = encode((before + body).decode("utf-8", "replace"))
        pieces = [piece(token) for token in ids]
        start, end = 0, b""
        while before and start < len(ids) and not end.endswith(before):
            end += pieces[start]
            start += 1
        if b"".join(pieces[start:]) == body:
            return ids[start:]
    return None


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
        ids = inside(body, self._vocabulary.encode_plain, self._piece)
        return self._greedy(body) if ids is None else ids

    def _piece(self, token: int) -> bytes:
        return self.tokens[token] if token < len(self.tokens) else b""

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
