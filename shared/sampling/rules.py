"""Changes of logits before a token is chosen: the request options that depend on more than one row of logits.

Pure: no I/O, no clock. The changed row is a function of the row, the session's tokens before the position and the
session's `Sampling`, so the text depends on no batch and on no draft. The steps and their order are vLLM's:

    1. mask                       tokens that the caller's `TokenMask` forbids
    2. allowed_token_ids          all other tokens
    3. bad_words                  the last token of a sequence whose other tokens end the output
    4. min_tokens                 `withheld_ids`, while the output is shorter
    5. logit_bias                 logit + bias
    6. repetition_penalty         logit / p if positive, else logit x p: tokens of prompt and output
       frequency_penalty          logit - p x occurrences in the output
       presence_penalty           logit - p: tokens of the output
    7. min_p                      tokens less probable than min_p x the most probable one, at the temperature

Steps 1 to 4 and 7 set logits to -inf. Greedy choices ignore step 7, which always keeps the largest logit. Where a
budget of reasoning is used up (vLLM's `thinking_token_budget`), the closing tag is chosen whatever the steps say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.messages import ReasoningBudget, Sampling

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class TokenMask(Protocol):
    """The tokens that may come next in a session, given those before: the first step of the rules."""

    @property
    def only(self) -> int | None:
        """The only token that may come next; None if there are several."""

    @property
    def few(self) -> Ids | None:
        """The tokens that may come next, ascending, if they are known to be few; else None."""

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        """Set the logits of tokens that may not come next to -inf.

        ids: the tokens of the columns, ascending; None for the whole vocabulary.
        """

    def push(self, token: int) -> None:
        """Go on to the position after `token`."""


class ReasoningCount:
    """Counts the tokens of an output's reasoning against its budget.

    The reasoning begins with the output, or before it, and the first closing tag ends it for good.
    """

    def __init__(self, budget: ReasoningBudget, output: Sequence[int] = ()) -> None:
        """output: the tokens so far. Most of them are searched, not pushed: to push each would take milliseconds."""
        self._most, self._opening, self._closing = budget.most, budget.opening, budget.closing
        self._blank = frozenset(budget.blank)
        self._state: Literal["start", "reasoning", "over"] = "reasoning" if budget.opening is None else "start"
        self._count = 0
        """Tokens of the reasoning so far."""
        at = 0
        while self._state == "start" and at < len(output):
            self.push(output[at])
            at += 1
        if self._state == "reasoning":
            self._count = len(output) - at
            if self._count > self._most or self._closing in output[at:]:
                self._state = "over"

    @property
    def forced(self) -> int | None:
        """The closing tag where it has to come next, because the budget is used up; else None."""
        return self._closing if self._state == "reasoning" and self._count >= self._most else None

    def push(self, token: int) -> None:
        """Go on to the position after `token`."""
        if self._state == "start":
            if token == self._opening:
                self._state = "reasoning"
            elif token not in self._blank:
                self._state = "over"
        elif self._state == "reasoning":
            # A draft may hold another token than the closing tag; nothing behind it is of use.
            if token == self._closing or self._count >= self._most:
                self._state = "over"
            else:
                self._count += 1


class LogitsProcessor:
    """Applies a session's rules to its logits, position after position."""

    def __init__(self, sampling: Sampling, tokens: Sequence[int], mask: TokenMask | None = None) -> None:
        """tokens: all tokens of the session before the first position; they are copied."""
        self._rules = sampling.rules
        self._temperature = sampling.temperature
        self._mask = mask
        self._output: list[int] = []
        self._seen: dict[int, None] = {}
        self._counts: Counter[int] = Counter()
        self._reasoning: ReasoningCount | None = None
        if (rules := sampling.rules) is None:
            return
        self._output = list(tokens[rules.prompt_len :])
        self._withheld = _array(rules.withheld_ids)
        self._allowed = None if rules.allowed_token_ids is None else _array(rules.allowed_token_ids)
        self._biased = _array([one.token for one in rules.logit_bias])
        self._biases = np.array([one.bias for one in rules.logit_bias], dtype=np.float32)
        if rules.repetition_penalty != 1:
            self._seen = dict.fromkeys(tokens)
        if rules.frequency_penalty or rules.presence_penalty:
            self._counts = Counter(self._output)
        if rules.reasoning is not None:
            self._reasoning = ReasoningCount(rules.reasoning, self._output)

    @classmethod
    def of(cls, sampling: Sampling, tokens: Sequence[int], mask: TokenMask | None = None) -> LogitsProcessor | None:
        """Return the processor of a session; None if nothing changes its logits."""
        return None if sampling.rules is None and mask is None else cls(sampling, tokens, mask)

    @property
    def only(self) -> int | None:
        """The only token that may be chosen, whatever the logits; None if they decide."""
        if self._reasoning is not None and (forced := self._reasoning.forced) is not None:
            return forced
        return self._mask.only if self._mask is not None and self._rules is None else None

    @property
    def only_masks(self) -> bool:
        """True if only a mask changes logits: a token chosen without it is then the choice if the mask allows it."""
        return self._rules is None

    @property
    def few(self) -> Ids | None:
        """The tokens that the mask has, ascending, if they are few."""
        return None if self._mask is None else self._mask.few

    def allows(self, token: int) -> bool:
        """Return whether the mask has a token."""
        return self._mask is None or self._mask.allows(token)

    def push(self, token: int) -> None:
        """Go on to the position after `token`."""
        if self._mask is not None:
            self._mask.push(token)
        if (rules := self._rules) is None:
            return
        self._output.append(token)
        if rules.repetition_penalty != 1:
            self._seen[token] = None
        if rules.frequency_penalty or rules.presence_penalty:
            self._counts[token] += 1
        if self._reasoning is not None:
            self._reasoning.push(token)

    def apply(self, logits: Floats, ids: Ids | None = None) -> Floats:
        """Return the changed logits of the position, as a new array. All of them may be -inf.

        ids: the tokens of the columns, ascending; None if `logits` has the whole vocabulary.
        """
        changed = logits.astype(np.float32)
        if self._reasoning is not None and (forced := self._reasoning.forced) is not None:
            column, _ = _columns(_array([forced]), len(changed), ids)
            kept = changed[column]
            changed.fill(-np.inf)
            changed[column] = kept
            return changed
        if self._mask is not None:
            self._mask.apply(changed, ids)
        if self._rules is not None:
            self._restrict(changed, ids)
            self._penalize(changed, ids)
            self._keep_probable(changed)
        return changed

    def _restrict(self, logits: Floats, ids: Ids | None) -> None:
        rules = self._rules
        assert rules is not None
        if self._allowed is not None:
            columns, _ = _columns(self._allowed, len(logits), ids)
            kept = logits[columns]
            logits.fill(-np.inf)
            logits[columns] = kept
        banned = [word[-1] for word in rules.bad_words if self._is_begun(word)]
        if banned:
            logits[_columns(_array(banned), len(logits), ids)[0]] = -np.inf
        if len(self._output) < rules.min_tokens:
            logits[_columns(self._withheld, len(logits), ids)[0]] = -np.inf
        if len(self._biased):
            columns, known = _columns(self._biased, len(logits), ids)
            np.add.at(logits, columns, self._biases[known])

    def _is_begun(self, word: Sequence[int]) -> bool:
        """Return whether the output ends with all tokens of a bad word but its last."""
        before = len(word) - 1
        if not before:
            return True
        # The last token first: there may be a thousand words, and few of them go on here.
        return self._output[-1:] == [word[-2]] and self._output[-before:] == list(word[:-1])

    def _penalize(self, logits: Floats, ids: Ids | None) -> None:
        rules = self._rules
        assert rules is not None
        if self._seen:
            columns, _ = _columns(_array(list(self._seen)), len(logits), ids)
            values, penalty = logits[columns], np.float32(rules.repetition_penalty)
            logits[columns] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            columns, known = _columns(_array(list(self._counts)), len(logits), ids)
            counts = np.array(list(self._counts.values()), dtype=np.float32)[known]
            logits[columns] -= np.float32(rules.frequency_penalty) * counts
            logits[columns] -= np.float32(rules.presence_penalty)

    def _keep_probable(self, logits: Floats) -> None:
        rules = self._rules
        assert rules is not None
        if rules.min_p and self._temperature:
            least = np.float32(float(logits.max()) + self._temperature * math.log(rules.min_p))
            logits[logits < least] = -np.inf


def _array(tokens: Sequence[int]) -> Ids:
    return np.array(tokens, dtype=np.int64)


def _columns(tokens: Ids, count: int, ids: Ids | None) -> tuple[Ids, NDArray[np.bool_]]:
    """Return the columns of those of the tokens that have one, and which tokens these are."""
    if ids is None:
        known = tokens < count
        return tokens[known], known
    at = np.minimum(ids.searchsorted(tokens), count - 1)
    known = ids[at] == tokens
    return at[known], known
