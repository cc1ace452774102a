"""Which draft tokens become part of the text.

One rule for greedy and sampled decoding: the target's own choice at each position is fixed by its logits and the
session's noise (`shared.sampling.sampler`), so a draft token is accepted exactly while it equals that choice, and the
first choice that differs, or the one after the last draft token, is already the right next token (the bonus token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages import Finish


@dataclass(frozen=True)
class Verdict:
    """What one round adds to its session. `tokens[:accepted]` were drafted, the rest is the target's own."""

    accepted: int
    tokens: list[int]
    finish: Finish | None


def accept(draft: Sequence[int], choices: Sequence[int], room: int, stop_ids: frozenset[int]) -> Verdict:
    """Judge a draft by the target's choices.

    `choices` are the target's tokens at the positions of the draft and one more, as far as they are needed: up to the
    first that differs from the draft. `room` (at least 1) is how many tokens the session may still get. The text ends
    with the first stop token, which is committed but not shown, or when there is no room left.
    """
    accepted = 0
    while accepted < len(draft) and draft[accepted] == choices[accepted]:
        accepted += 1
    tokens = list(choices[: accepted + 1])[:room]
    for i, token in enumerate(tokens):
        if token in stop_ids:
            tokens = tokens[: i + 1]
            return Verdict(min(accepted, len(tokens)), tokens, Finish.STOP)
    finish = Finish.LENGTH if len(tokens) == room else None
    return Verdict(min(accepted, len(tokens)), tokens, finish)
