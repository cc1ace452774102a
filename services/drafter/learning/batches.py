"""Batches of texts with the target's hidden states, for a draft model to learn from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LearnableText(Protocol):
    """A text with the target's state at each token: a prompt, and what the target answered."""

    @property
    def tokens(self) -> Tensor:
        """Token ids: (tokens,)."""

    @property
    def hidden(self) -> Tensor:
        """The target's state after its last norm at each token, (tokens, size); the last one may be missing, zero."""

    @property
    def prompt_len(self) -> int:
        """Number of its first tokens that belong to the prompt."""

    @property
    def bottom(self) -> Tensor | None:
        """Output of the target's first layers for the tokens, (tokens, size), if the draft uses them."""


@dataclass(frozen=True)
class Minibatch:
    """Texts of similar length, padded at the end: (texts, tokens) and (texts, tokens, size)."""

    tokens: Tensor
    bottom: Tensor | None
    hidden: Tensor
    learned: Tensor
    """Positions to learn from: the answer's, from its first token to the last one with a known state."""

    def to(self, torch_device: torch.device) -> Minibatch:
        """Return a copy on a torch device."""
        bottom = None if self.bottom is None else self.bottom.to(torch_device)
        return Minibatch(
            self.tokens.to(torch_device), bottom, self.hidden.to(torch_device), self.learned.to(torch_device)
        )


def batches(texts: Sequence[LearnableText], tokens: int, drop: float, order: random.Random) -> Iterator[Minibatch]:
    """Yield one pass over the texts in random order, about `tokens` a batch.

    drop: share of texts whose first states are zeroed."""
    shuffled = list(texts)
    order.shuffle(shuffled)
    pools = [sorted(shuffled[i : i + 512], key=lambda text: len(text.tokens)) for i in range(0, len(shuffled), 512)]
    groups: list[list[LearnableText]] = []
    for pool in pools:
        group: list[LearnableText] = []
        for text in pool:
            if group and (len(group) + 1) * len(text.tokens) > tokens:
                groups.append(group)
                group = []
            group.append(text)
        groups.append(group)
    order.shuffle(groups)
    for group in groups:
        yield _padded(group, drop, order)


def _padded(group: Sequence[LearnableText], drop: float, order: random.Random) -> Minibatch:
    longest = max(len(text.tokens) for text in group)
    tokens = torch.zeros(len(group), longest, dtype=torch.int64)
    hidden = torch.zeros(len(group), longest, group[0].hidden.shape[1], dtype=torch.bfloat16)
    bottom = torch.zeros_like(hidden) if group[0].bottom is not None else None
    learned = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, text in enumerate(group):
        n = len(text.tokens)
        tokens[i, :n] = text.tokens
        hidden[i, :n] = text.hidden
        if bottom is not None and text.bottom is not None:
            bottom[i, :n] = text.bottom
        first = max(1, text.prompt_len)
        if order.random() < drop:
            # A regulariser: later positions are guessed without these states.
            missing = order.randrange(1, max(2, n // 2))
            hidden[i, :missing] = 0
            first = max(first, missing + 1)
        learned[i, first : n - 1] = True
    return Minibatch(tokens, bottom, hidden, learned)
