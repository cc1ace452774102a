"""Masks: the tokens that a grammar allows at a position of a session.

A mask is a function of the grammar and of the tokens since the beginning of the answer. Where the grammar forces text,
it also forces the tokens: those of the tokenizer for that text. The tokens of a forced text are fixed where the text
begins, up to its end. When the grammar is complete, only the end-of-text tokens are allowed.

A session's state in its grammar is kept between calls and follows the tokens given, forwards and back, so that nobody
has to say what was accepted. It is rebuilt from the tokens where it was lost. Calls may come from any thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from shared.errors import GrammarError
from shared.grammar.build import LIMITS
from shared.messages import Grammar
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

MOST_SESSIONS = 512
"""Most sessions whose state is kept; those not used for longest are dropped first, and rebuilt when needed."""
MOST_GRAMMARS = 64
CHECKED = 8
"""Most forced tokens at the beginning of a new grammar behind which masks are tried."""
_MARK = b"\x02"
"""A character that begins no word."""
FEW = 4096
"""Up to so many allowed tokens, their logits are kept one by one."""


class Vocabulary(Protocol):
    """The part of `shared.models.text.Tokenizer` that masks need."""

    special_tokens: dict[str, int]

    def token_bytes(self, token: int) -> bytes:
        """Return the token's bytes in a text."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text without control tokens."""


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that may come next."""

    forced: Sequence[int]
    """The only token that may come next and those that must follow it; empty where there is a choice."""
    words: NDArray[np.uint32] | None = None
    """A bit for each token of the vocabulary, from the lowest one of the first word on; None where one is forced."""

    @property
    def only(self) -> int | None:
        """The only token that may come next; None if there are several."""
        return self.forced[0] if self.forced else None

    @cached_property
    def flags(self) -> NDArray[np.bool_]:
        """One flag for each token."""
        assert self.words is not None
        return np.unpackbits(self.words.view(np.uint8), bitorder="little").view(np.bool_)

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""
        if self.forced:
            return token == self.forced[0]
        assert self.words is not None
        return token < 32 * len(self.words) and bool(self.words[token >> 5] >> np.uint32(token & 31) & np.uint32(1))

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        """Set the logits of tokens that may not come next to -inf. ids: the tokens of the columns; None for all."""
        if self.forced:
            columns = np.array([self.forced[0]]) if ids is None else np.flatnonzero(ids == self.forced[0])
        elif ids is not None:
            columns = np.flatnonzero(self.flags[ids])
        else:
            assert self.words is not None
            count = int(np.bitwise_count(self.words).sum())
            if count > FEW:
                flags = self.flags
                if len(flags) < len(logits):
                    logits[len(flags) :] = -np.inf
                np.copyto(logits[: len(flags)], np.float32(-np.inf), where=~flags[: len(logits)])
                return
            columns = np.flatnonzero(self.flags)
        columns = columns[columns < len(logits)]
        kept = logits[columns]
        logits.fill(-np.inf)
        logits[columns] = kept


@dataclass(frozen=True)
class TokenChain:
    """Tokens that may follow an answer one after the other: a draft, and what the grammar forces behind it."""

    tokens: list[int]
    drafted: int
    """Number of its first tokens that are of the draft."""
    allowed: list[AllowedTokens]
    """The tokens that may come at each position, and behind the chain unless it ends the answer; empty without a
    grammar."""

    @property
    def certain(self) -> int:
        """Number of its first tokens that are the only ones that may come: no logits are needed to choose them."""
        if not self.allowed:
            return 0
        places = enumerate(zip(self.tokens, self.allowed, strict=False))
        return next((at for at, (token, allowed) in places if allowed.only != token), len(self.tokens))


class GrammarSession:
    """One session's state in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._eos_ids = frozenset(eos_ids)
        self._words = (vocab_size + 31) // 32
        self._lock = threading.Lock()
        self._tokens: list[int] = []
        """Tokens of the answer that the state stands behind."""
        self._ended_at: int | None = None
        """Tokens before the first end-of-text token; the matcher has not consumed it or any later token."""
        self._forced: list[Sequence[int]] = [()]
        """Forced tokens from each position on, the current one last."""
        self._allowed: AllowedTokens | None = None
        """Those of the current position, if they were computed."""
        self._forced[0] = self._forcing()

    def after(self, tokens: list[int]) -> AllowedTokens:
        """Return the tokens that may follow these tokens of the answer.

        Raises GrammarError if the grammar does not allow them, or is too expensive at this position.
        """
        with self._lock:
            self._follow(tokens)
            if self._allowed is None:
                self._allowed = self._compute()
            return self._allowed

    def chain(
        self, answer: list[int], draft: Sequence[int], room: int, most_forced: int, stop_ids: Collection[int] = ()
    ) -> TokenChain:
        """Return the draft up to the first token that may not come, and the tokens that are forced from there on.

        room: most tokens of the chain. most_forced: most tokens that are not of the draft. stop_ids: tokens that end
        the answer. Raises GrammarError as `after` does.
        """
        chain = TokenChain([], 0, [])
        drafted, forced = 0, 0
        with self._lock:
            self._follow(answer)
            while True:
                if self._allowed is None:
                    self._allowed = self._compute()
                allowed = self._allowed
                chain.allowed.append(allowed)
                if len(chain.tokens) >= room:
                    break
                if not forced and drafted < len(draft) and allowed.allows(draft[drafted]):
                    token = draft[drafted]
                    drafted += 1
                elif allowed.only is not None and forced < most_forced:
                    token = allowed.only
                    forced += 1
                else:
                    break
                chain.tokens.append(token)
                if token in stop_ids:
                    break
                self._consume(token)
        return replace(chain, drafted=drafted)

    def _compute(self) -> AllowedTokens:
        if forced := self._forced[-1]:
            return AllowedTokens(forced)
        words = np.zeros(self._words, dtype=np.uint32)
        if self._ended_at is not None:
            for token in self._eos_ids:
                words[token >> 5] |= np.uint32(1 << (token & 31))
        else:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._check()
        if int(np.bitwise_count(words).sum()) != 1:
            return AllowedTokens((), words)
        word = int(words.argmax())
        return AllowedTokens((32 * word + int(words[word]).bit_length() - 1,))

    def _follow(self, tokens: list[int]) -> None:
        """Bring the state behind these tokens."""
        known = len(self._tokens)
        if len(tokens) >= known and tokens[:known] == self._tokens:
            kept = known
        else:
            pairs = zip(self._tokens, tokens, strict=False)
            kept = next((i for i, (old, new) in enumerate(pairs) if old != new), min(known, len(tokens)))
            self._go_back(kept)
        for token in tokens[kept:]:
            self._consume(token)

    def _go_back(self, length: int) -> None:
        ended_at = len(self._tokens) if self._ended_at is None else self._ended_at
        if length < ended_at and not self._matcher.rollback(ended_at - length):
            self._check()
        if self._ended_at is not None and length <= self._ended_at:
            self._ended_at = None
        del self._tokens[length:]
        del self._forced[length + 1 :]
        self._allowed = None

    def _consume(self, token: int) -> None:
        self._allowed = None
        forced = self._forced[-1]
        if token in self._eos_ids:
            if self._ended_at is None and not self._matcher.is_accepting():
                raise GrammarError(f"token {token} ends the answer before its grammar is complete")
            if self._ended_at is None:
                self._ended_at = len(self._tokens)
            self._tokens.append(token)
            self._forced.append(())
            return
        # Probed first: a matcher that consumes a token that it does not allow is of no more use.
        if self._ended_at is not None or (forced and token != forced[0]) or not self._matcher.validate_tokens([token]):
            self._check()
            raise GrammarError(f"token {token} is not allowed at position {len(self._tokens)} of the answer")
        if not self._matcher.consume_token(token):
            self._check()
        self._tokens.append(token)
        self._forced.append(forced[1:] or self._forcing())

    def _forcing(self) -> Sequence[int]:
        """Return the tokens that are forced from here on."""
        forced = tuple(self._matcher.compute_ff_tokens())
        self._check()
        return forced

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {self._matcher.get_error()[:300]}")


class ChainMask:
    """The masks of a chain's positions, one after the other: a `shared.sampling.rules.TokenMask`."""

    def __init__(self, allowed: Sequence[AllowedTokens], at: int = 0) -> None:
        """at: the first position."""
        self._allowed = allowed
        self._at = at

    @property
    def only(self) -> int | None:
        """The only token of this position; None if there are several."""
        return self._allowed[self._at].only

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""
        return self._allowed[self._at].allows(token)

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        """Set the logits of tokens that may not come next to -inf."""
        self._allowed[self._at].apply(logits, ids)

    def push(self, token: int) -> None:
        """Go on to the next position; `token` is the chain's."""
        self._at += 1


class DraftMask:
    """The masks of a draft in progress: a `shared.sampling.rules.TokenMask`.

    A draft that left the grammar is of no more use; it has no masks from there on.
    """

    def __init__(self, session: GrammarSession, answer: Sequence[int]) -> None:
        """answer: the session's tokens since the beginning of the answer, drafted ones included; they are copied."""
        self._session = session
        self._answer = list(answer)

    @property
    def allowed(self) -> AllowedTokens | None:
        """The tokens of this position; None outside the grammar."""
        try:
            return self._session.after(self._answer)
        except GrammarError:
            return None

    @property
    def only(self) -> int | None:
        """The only token of this position; None if there are several."""
        return None if (allowed := self.allowed) is None else allowed.only

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""
        return (allowed := self.allowed) is None or allowed.allows(token)

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        """Set the logits of tokens that may not come next to -inf."""
        if (allowed := self.allowed) is not None:
            allowed.apply(logits, ids)

    def push(self, token: int) -> None:
        """Go on to the position after `token`."""
        self._answer.append(token)


@dataclass(frozen=True)
class DraftGrammar:
    """The grammar of a session in its drafter."""

    session: GrammarSession
    prompt_len: int

    def mask(self, tokens: Sequence[int]) -> DraftMask:
        """Return the masks from the position after these tokens of the session on."""
        return DraftMask(self.session, tokens[self.prompt_len :])


class Grammars:
    """The grammars of one process's sessions, for one model."""

    def __init__(self, load: Callable[[], Vocabulary], vocab_size: int, eos_ids: Sequence[int]) -> None:
        """load: returns the model's tokenizer; it is called for the first grammar."""
        self._load = load
        self._vocab_size = vocab_size
        self._eos_ids = [token for token in eos_ids if token < vocab_size]
        self._building = threading.Lock()
        """Guards the matchers. It may be held for seconds: the first grammar loads the vocabulary."""
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        """Guards the sessions, and is never held for long, so that event loops can take it."""
        self._sessions: OrderedDict[str, tuple[str, GrammarSession]] = OrderedDict()
        """Each session's grammar and its state in it."""
        self._begun: dict[str, object] = {}
        """A mark of the latest call that builds a session's state; `forget` takes it away."""

    @classmethod
    def of(cls, folder: ModelFolder) -> Grammars:
        """Return the grammars for the model in a folder. Nothing is read before the first grammar."""
        return cls(lambda: Tokenizer(folder), folder.vocab_size, folder.eos_ids)

    def session(self, session_id: str, grammar: Grammar) -> GrammarSession:
        """Return a session's state, a new one if it is not kept. Raises GrammarError."""
        with self._lock:
            text, kept = self._sessions.get(session_id, (None, None))
            if kept is not None and text == grammar.text:
                self._sessions.move_to_end(session_id)
                return kept
            mark = self._begun[session_id] = object()
        session = None
        try:
            session = self._begin(grammar.text)
            return session
        finally:
            with self._lock:
                if self._begun.get(session_id) is mark:
                    del self._begun[session_id]
                    if session is not None:
                        self._sessions[session_id] = grammar.text, session
                        self._sessions.move_to_end(session_id)
                        if len(self._sessions) > MOST_SESSIONS:
                            self._sessions.popitem(last=False)

    def forget(self, session_id: str) -> None:
        """Drop the state of a session that has ended or moved; nothing happens if it has none. Never waits long."""
        with self._lock:
            self._sessions.pop(session_id, None)
            self._begun.pop(session_id, None)

    def check(self, text: str) -> None:
        """Raise GrammarError if sessions cannot follow this grammar, as far as its first masks show."""
        self._begin(text).chain([], [], CHECKED, CHECKED)

    def _begin(self, text: str) -> GrammarSession:
        """Return a state at the beginning of a grammar. Raises GrammarError."""
        with self._building:
            return GrammarSession(self._matcher(text).deep_copy(), self._vocab_size, self._eos_ids)

    def _matcher(self, text: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar, to be copied."""
        if (matcher := self._matchers.get(text)) is None:
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise GrammarError(f"the grammar cannot be built: {matcher.get_error()[:300]}")
            self._matchers[text] = matcher
            if len(self._matchers) > MOST_GRAMMARS:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(text)
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not self._eos_ids:
            raise GrammarError("the model has no end-of-text token, so no grammar can end")
        return LLTokenizer(
            TokenizerWrapper(_Tokens(self._load(), self._vocab_size, self._eos_ids)),
            n_vocab=self._vocab_size,
            eos_token=list(self._eos_ids),
        )


class _Tokens:
    """A vocabulary as llguidance reads it. A token without bytes is never allowed."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = sorted(
            {token for token in vocabulary.special_tokens.values() if token < vocab_size} | set(eos_ids)
        )
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text inside an answer."""
        body = text.encode() if isinstance(text, str) else text
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
