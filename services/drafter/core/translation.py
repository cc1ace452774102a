"""From the tokens of a draft model to those of a target with another vocabulary.

Both vocabularies are compared as bytes, so that it does not matter how a tokenizer spells a space or a byte. Each token
of the draft model is read as the target's tokens for the same bytes: as one token where the target has the same one,
else as several. The draft model's distribution then gives the target's next token the weight of all draft tokens whose
reading begins with it, and that token is chosen with the target's own noise. Restricting drafts to the tokens that both
have is known as token-level intersection (arXiv 2502.05202, algorithm 4); the readings of several tokens go past it.
A target's token that is longer than the draft model's own is never drafted.

What is read wrongly costs speed and no more: the target verifies every token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

from shared.grammar.vocabulary import inside
from shared.sampling.rules import Floats, Ids
from shared.sampling.sampler import Columns

LONGEST = 8
"""Most target tokens that a draft token is read as."""
NEGLIGIBLE = 1e-3
"""Share of a token's weight below which a reading that begins with it is left out."""
_LEAST = np.float32(1e-37)
"""In place of a weight of zero, whose logarithm is not finite."""


class DraftVocabulary(Protocol):
    """The part of `shared.models.text.Tokenizer` that a translation needs."""

    special_tokens: dict[str, int]

    def token_bytes(self, token: int) -> bytes:
        """Return the token's bytes in a text; none for control tokens and unknown ids."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text without control tokens."""


@dataclass(frozen=True)
class Side:
    """The vocabulary of one of the two models."""

    vocabulary: DraftVocabulary
    size: int
    """Columns of its logits."""
    ends: Sequence[int] = ()
    """Tokens that end a text, the usual one first."""
    begin: Sequence[int] = ()
    """Control tokens before every text."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A draft token that may come next, read as target tokens."""

    path: tuple[int, ...]
    """The target tokens that are still to come."""
    weight: float
    token: int
    kept: int | None = None
    """Tokens of the draft model's context that come before it; None for all of them."""


class Choices:
    """The target tokens that may come next, and what the draft model would go on with."""

    def __init__(self, columns: Columns, weights: Floats, rest: float) -> None:
        """weights: of each column, not normalised. rest: that of draft tokens that cannot be read."""
        self.columns = columns
        self.logits: Floats = np.log(np.maximum(weights, _LEAST))
        """Logits of the columns."""
        self._rest = rest

    @property
    def with_rest(self) -> Floats:
        """The logits, and behind them that of all that cannot be read, for statistics of the chosen token."""
        if self._rest <= 0:
            return self.logits
        return np.append(self.logits, np.float32(math.log(self._rest)))

    def readings(self, token: int) -> list[Reading]:
        """Return the readings that begin with a token, that token included."""
        raise NotImplementedError

    def after(self, token: int) -> Choices | Reading | None:
        """Go on behind a target token.

        Returns the draft token that is now complete, or the choices within longer ones if these have more weight; None
        if the token was not among the choices.
        """
        return following(self.readings(token))


class _FirstChoices(Choices):
    def __init__(self, translation: Translation, weights: Floats, opened: Sequence[Reading]) -> None:
        sums = np.add.reduceat(weights[translation.order], translation.starts)
        rest = float(weights.sum()) - float(sums.sum())
        ids = translation.columns.ids
        for reading in opened:
            at = int(ids.searchsorted(reading.path[0]))
            if at < len(ids) and ids[at] == reading.path[0]:
                sums[at] += reading.weight
        super().__init__(translation.columns, sums, max(rest, 0.0))
        self._translation, self._weights, self._opened = translation, weights, opened

    def readings(self, token: int) -> list[Reading]:
        plain = self._translation.readings(token, self._weights)
        return [*plain, *(reading for reading in self._opened if reading.path[0] == token)]


class ReadingChoices(Choices):
    """The choices among the first tokens of some readings, at least one."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._by_token: dict[int, list[Reading]] = defaultdict(list)
        for reading in readings:
            self._by_token[reading.path[0]].append(reading)
        ids = sorted(self._by_token)
        weights = [sum(reading.weight for reading in self._by_token[token]) for token in ids]
        super().__init__(Columns.of(np.array(ids, dtype=np.int64)), np.array(weights, dtype=np.float32), 0.0)

    def readings(self, token: int) -> list[Reading]:
        return self._by_token.get(token, [])


def following(readings: Iterable[Reading]) -> Choices | Reading | None:
    """Return what comes behind the first token of readings; see `Choices.after`."""
    ended: Reading | None = None
    longer: list[Reading] = []
    for reading in readings:
        if len(reading.path) > 1:
            longer.append(Reading(reading.path[1:], reading.weight, reading.token, reading.kept))
        elif ended is None or reading.weight > ended.weight:
            ended = reading
    if ended is not None and ended.weight >= sum(reading.weight for reading in longer):
        return ended
    return ReadingChoices(longer) if longer else None


class Translation:
    """Reads a draft model's tokens as a target's, and a target's control tokens as the draft model's."""

    def __init__(self, draft: Side, target: Side) -> None:
        self.draft, self.target = draft, target
        self.paths = _paths(draft, target)
        """Reading of each draft token; empty for one that cannot be read."""
        read = [token for token, path in enumerate(self.paths) if path]
        firsts = np.array([self.paths[token][0] for token in read], dtype=np.int64)
        by_first = firsts.argsort(kind="stable")
        self.order: Ids = np.array(read, dtype=np.int64)[by_first]
        """Draft tokens with a reading, sorted by its first token."""
        ids, starts = np.unique(firsts[by_first], return_index=True)
        self.columns = Columns.of(ids)
        """The target tokens with which readings begin."""
        self.starts: Ids = starts.astype(np.int64)
        """Where the draft tokens of each column begin in `order`."""
        self._stops = np.append(self.starts[1:], len(read))
        self.controls = _controls(draft, target)
        """Draft tokens in place of each control token of the target; most often none."""

    def choices(self, weights: Floats, opened: Sequence[Reading] = ()) -> Choices:
        """Return the next target tokens. weights: of each draft token. opened: readings of an earlier place."""
        return _FirstChoices(self, weights, opened)

    def group(self, token: int) -> Ids:
        """Return the draft tokens whose reading begins with a target token."""
        at = int(self.columns.ids.searchsorted(token))
        if at == len(self.columns.ids) or self.columns.ids[at] != token:
            return self.order[:0]
        return self.order[self.starts[at] : self._stops[at]]

    def readings(self, token: int, weights: Floats) -> list[Reading]:
        """Return the readings that begin with a target token, without those of negligible weight."""
        group = self.group(token)
        own = weights[group]
        likely = own >= NEGLIGIBLE * own.sum()
        pairs = zip(group[likely].tolist(), own[likely].tolist(), strict=True)
        return [Reading(self.paths[each], weight, each) for each, weight in pairs]

    def opened(self, begun: Sequence[int]) -> Ids:
        """Return the draft tokens whose reading begins with these target tokens and goes on behind them."""
        begun = tuple(begun)
        paths = self.paths
        longer = [each for each in self.group(begun[0]).tolist() if _goes_on(paths[each], begun)] if begun else []
        return np.array(longer, dtype=np.int64)

    def open_readings(self, begun: Sequence[int], weights: Floats, least: float, kept: int) -> list[Reading]:
        """Return the readings that go on behind these target tokens, of which the draft model has computed none.

        weights: of each draft token in the place of the first of them. least: the weight below which one is left out.
        kept: tokens of the context before that place.
        """
        tokens = self.opened(begun)
        own = weights[tokens]
        likely = own > least
        pairs = zip(tokens[likely].tolist(), own[likely].tolist(), strict=True)
        return [Reading(self.paths[each][len(begun) :], weight, each, kept) for each, weight in pairs]


def coverage(draft: DraftVocabulary, target: DraftVocabulary, text: str) -> float:
    """Return the share of a text's target tokens that drafts can contain.

    Those are the tokens inside which no token of the draft model ends. 0 if a tokenizer changes the text.
    """
    wanted, own = (_ends(vocabulary, text.encode()) for vocabulary in (target, draft))
    if not wanted or not own:
        return 0.0
    borders = np.array([0, *own])
    # As many borders up to its start as before its end: none is inside the token.
    up_to_start = borders.searchsorted(np.array([0, *wanted[:-1]]), "right")
    before_end = borders.searchsorted(np.array(wanted), "left")
    return float((up_to_start >= before_end).mean())


def _goes_on(path: tuple[int, ...], begun: tuple[int, ...]) -> bool:
    return len(path) > len(begun) and path[: len(begun)] == begun


def _paths(draft: Side, target: Side) -> list[tuple[int, ...]]:
    """Return the target tokens of each draft token."""
    words = target.vocabulary
    known = {piece: token for token in range(target.size - 1, -1, -1) if (piece := words.token_bytes(token))}
    controls = set(draft.vocabulary.special_tokens.values())
    texts = {token: text for text, token in draft.vocabulary.special_tokens.items()}
    paths: list[tuple[int, ...]] = []
    for token in range(draft.size):
        if token in controls:
            same = words.special_tokens.get(texts[token])
            end = target.ends[:1] if token in draft.ends else ()
            paths.append((same,) if same is not None and same < target.size else tuple(end))
        else:
            paths.append(_path(draft.vocabulary.token_bytes(token), target, known))
    return paths


def _path(piece: bytes, target: Side, known: dict[bytes, int]) -> tuple[int, ...]:
    """Return the target tokens of some bytes; none where they are a part of a character that the target lacks."""
    if (same := known.get(piece)) is not None:
        return (same,)
    try:
        piece.decode()
    except UnicodeDecodeError:
        return ()
    ids = inside(piece, target.vocabulary.encode_plain, target.vocabulary.token_bytes) or ()
    return tuple(ids) if len(ids) <= LONGEST and all(each < target.size for each in ids) else ()


def _controls(draft: Side, target: Side) -> dict[int, tuple[int, ...]]:
    own = draft.vocabulary.special_tokens
    controls: dict[int, tuple[int, ...]] = {}
    for text, token in target.vocabulary.special_tokens.items():
        if (same := own.get(text)) is not None and same < draft.size:
            controls[token] = (same,)
        else:
            controls[token] = tuple(draft.ends[:1]) if token in target.ends else ()
    return controls


def _ends(vocabulary: DraftVocabulary, body: bytes) -> list[int]:
    """Return where each token of a text ends, in bytes; nothing if the tokenizer changes the text."""
    ids = inside(body, vocabulary.encode_plain, vocabulary.token_bytes) or ()
    return list(accumulate(len(vocabulary.token_bytes(token)) for token in ids))
