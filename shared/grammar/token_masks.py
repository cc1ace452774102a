"""Masks in the form in which choices take them: of a chain that is verified, and of a draft in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import GrammarError
from shared.grammar.allowed import AllowedTokens, Floats, Ids
from shared.grammar.masks import GrammarSession


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

    @property
    def few(self) -> Ids | None:
        """The tokens that may come next, if they are few."""
        return self._allowed[self._at].few

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
        self._left = False
        """True once the draft has left the grammar, or a mask is too expensive."""
        self._here: AllowedTokens | None = None

    @property
    def allowed(self) -> AllowedTokens | None:
        """The tokens of this position; None outside the grammar."""
        if self._here is None and not self._left:
            try:
                self._here = self._session.after(self._answer)
            except GrammarError:
                self._left = True
        return self._here

    @property
    def only(self) -> int | None:
        """The only token of this position; None if there may be several."""
        return None if (allowed := self.allowed) is None else allowed.only

    @property
    def few(self) -> Ids | None:
        """The tokens that may come next, if they are few."""
        try:
            return None if (allowed := self.allowed) is None else allowed.few
        except GrammarError:
            self._leave()
            return None

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""
        try:
            return (allowed := self.allowed) is None or allowed.allows(token)
        except GrammarError:
            self._leave()
            return True

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        """Set the logits of tokens that may not come next to -inf."""
        try:
            if (allowed := self.allowed) is not None:
                allowed.apply(logits, ids)
        except GrammarError:
            self._leave()

    def push(self, token: int) -> None:
        """Go on to the position after `token`."""
        self._answer.append(token)
        self._here = None

    def _leave(self) -> None:
        self._left, self._here = True, None


@dataclass(frozen=True)
class DraftGrammar:
    """The grammar of a session in its drafter."""

    session: GrammarSession
    prompt_len: int

    def mask(self, tokens: Sequence[int]) -> DraftMask:
        """Return the masks from the position after these tokens of the session on."""
        return DraftMask(self.session, tokens[self.prompt_len :])
