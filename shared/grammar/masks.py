"""Masks: the tokens that a grammar allows at a position of a session.

A mask is a function of the grammar and of the tokens since the beginning of the answer. Where the grammar forces text,
it also forces the tokens: those of the tokenizer for that text. The tokens of a forced text are fixed where the text
begins, up to its end. When the grammar is complete, only the end-of-text tokens are allowed.

A session's state in its grammar is kept between calls. Each call gives all tokens of the answer, and the state moves
forwards or back to them, so callers need not report which tokens were accepted. A lost state is rebuilt from the
tokens. Calls may come from any thread.

A mask costs many times as much as looking up one token, and the token that the logits choose by themselves is mostly
allowed. So masks are computed only where a choice needs one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from shared.errors import GrammarError
from shared.grammar.ahead import MasksAhead
from shared.grammar.allowed import AllowedTokens, Words
from shared.grammar.build import LIMITS
from shared.grammar.vocabulary import GrammarVocabulary, Vocabulary
from shared.messages import Grammar
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

MOST_SESSIONS = 512
"""Most sessions whose state is kept. The least recently used are dropped first, and rebuilt when needed."""
MOST_GRAMMARS = 64
CHECKED = 8
"""Most forced tokens at the beginning of a new grammar behind which masks are tried."""


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
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._end = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        """The mask of the end-of-text tokens."""
        for token in eos_ids:
            self._end[token >> 5] |= np.uint32(1 << (token & 31))
        self._lock = threading.Lock()
        self.needs_mask = False
        """See `GrammarPlaces`."""
        self._tokens: list[int] = []
        """Tokens of the answer that the state stands behind."""
        self._ended_at: int | None = None
        """Tokens before the first end-of-text token; the matcher has not consumed it or any later token."""
        self._forced: list[Sequence[int]] = []
        """Forced tokens from each position on, the current one last."""
        self._forced.append(self._forcing())

    def after(self, tokens: Sequence[int]) -> AllowedTokens:
        """Return the tokens that may follow these tokens of the answer.

        Raises GrammarError if the grammar does not allow them, or is too expensive at this position.
        """
        prefix = list(tokens)
        with self._lock:
            self._follow(prefix)
            return AllowedTokens(self._forced[-1], self, prefix, len(prefix))

    def chain(
        self, answer: list[int], draft: Sequence[int], room: int, most_forced: int, stop_ids: Collection[int] = ()
    ) -> TokenChain:
        """Return the draft up to the first token that may not come, and the tokens that are forced from there on.

        room: most tokens of the chain. most_forced: most tokens that are not of the draft. stop_ids: tokens that end
        the answer. Raises GrammarError as `after` does.
        """
        places: list[AllowedTokens] = []
        drafted, forced = 0, 0
        tokens = list(answer)
        length, end = len(answer), len(answer) + room
        with self._lock:
            self._follow(tokens)
            while True:
                allowed = AllowedTokens(self._forced[-1], self, tokens, length)
                places.append(allowed)
                if length >= end:
                    break
                if not forced and drafted < len(draft) and self._try(draft[drafted]):
                    token = draft[drafted]
                    drafted += 1
                elif allowed.only is not None and forced < most_forced:
                    token = allowed.only
                    self._consume(token)
                    forced += 1
                else:
                    break
                allowed.follows = token
                tokens.append(token)
                length += 1
                if token in stop_ids:
                    break
        return TokenChain(tokens[len(answer) :], drafted, places)

    def mask_after(self, tokens: list[int]) -> Words:
        """See `GrammarPlaces`."""
        with self._lock:
            self._follow(tokens)
            return self._mask()

    def is_allowed(self, tokens: list[int], token: int) -> bool:
        """See `GrammarPlaces`."""
        with self._lock:
            self._follow(tokens)
            if token in self._eos_ids:
                return self._ended_at is not None or self._matcher.is_accepting()
            if self._ended_at is not None or not 0 <= token < self._vocab_size:
                return False
            found = self._matcher.validate_tokens([token])
            self._check()
            return found == 1

    def _mask(self) -> Words:
        """Compute the mask of the current position."""
        if self._ended_at is not None:
            return self._end
        words = np.zeros_like(self._end)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words

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

    def _consume(self, token: int) -> None:
        """Go on behind a token. Raises GrammarError if it may not come."""
        if self._try(token):
            return
        if token in self._eos_ids:
            raise GrammarError(f"token {token} ends the answer before its grammar is complete")
        raise GrammarError(f"token {token} is not allowed at position {len(self._tokens)} of the answer")

    def _try(self, token: int) -> bool:
        """Go on behind a token if it may come; return whether it may."""
        forced = self._forced[-1]
        if forced and token != forced[0]:
            return False
        if token in self._eos_ids:
            if self._ended_at is None:
                if not self._matcher.is_accepting():
                    return False
                self._ended_at = len(self._tokens)
        elif self._ended_at is not None or not 0 <= token < self._vocab_size:
            return False
        # Not `consume_token`: a matcher that consumes a token that it does not allow is of no more use.
        elif self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            return False
        self._tokens.append(token)
        self._forced.append(forced[1:] or self._forcing())
        return True

    def _forcing(self) -> Sequence[int]:
        """Return the tokens that are forced from here on."""
        if self._ended_at is None:
            forced = tuple(self._matcher.compute_ff_tokens())
            self._check()
            if forced or not self._matcher.is_stopped():
                return forced
        return tuple(self._eos_ids) if len(self._eos_ids) == 1 else ()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {self._matcher.get_error()[:300]}")


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
        self._ahead = MasksAhead()
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

    def masks_ahead(self, chains: Sequence[TokenChain]) -> AbstractContextManager[None]:
        """Compute the masks that the first choices of these chains are likely to need, while the context lasts."""
        first = (next((one for one in chain.allowed if not one.forced), None) for chain in chains)
        return self._ahead.beside([one for one in first if one is not None and one.is_likely_masked])

    def check(self, text: str) -> None:
        """Raise GrammarError if sessions cannot follow this grammar, as far as its first masks show."""
        for allowed in self._begin(text).chain([], [], CHECKED, CHECKED).allowed:
            _ = allowed.words

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
            TokenizerWrapper(GrammarVocabulary(self._load(), self._vocab_size, self._eos_ids)),
            n_vocab=self._vocab_size,
            eos_token=list(self._eos_ids),
        )
