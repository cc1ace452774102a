"""Acceptance: the decision which draft tokens become part of the completion.

One rule covers greedy and sampled decoding. The target's choice at each position is fixed by its logits and the
session's noise (`shared.sampling.sampler`). A draft token is accepted exactly while it equals that choice. The first
choice that differs, or the one after the last draft token, is the next token itself: the bonus token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages import Finish


@dataclass(frozen=True)
class Verdict:
    """Tokens that one round adds to its session: `tokens[:accepted]` were drafted, the rest is the target's own."""

    accepted: int
    tokens: list[int]
    finish: Finish | None


def accept(draft: Sequence[int], choices: Sequence[int], room: int, stop_ids: frozenset[int]) -> Verdict:
    """Compare a draft with the target's choices.

    choices: the target's tokens at the positions of the draft and one more; those after the first difference, or after
    a stop token, may be missing. room: tokens that the session may still get, at least 1. The completion ends with the
    first stop token, which is committed but not shown, or when no room is left.
    """
    accepted = 0
    while accepted < min(len(draft), len(choices)) and draft[accepted] == choices[accepted]:
        accepted += 1
    tokens = list(choices[: accepted + 1])[:room]
    for i, token in enumerate(tokens):
        if token in stop_ids:
            tokens = tokens[: i + 1]
            return Verdict(min(accepted, len(tokens)), tokens, Finish.STOP)
    finish = Finish.LENGTH if len(tokens) == room else None
    return Verdict(min(accepted, len(tokens)), tokens, finish)
