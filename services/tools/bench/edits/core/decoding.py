"""The rounds in which a known output is decoded with copied drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.drafter.control import Controller
from services.drafter.sources import DraftRequest, LookupDrafts, Prediction
from shared.messages import Sampling

LOOKUP = "lookup"


@dataclass(frozen=True)
class CopiedRound:
    """A round: the number of committed tokens before it, its draft, and the number of accepted draft tokens."""

    base_len: int
    draft: tuple[int, ...]
    accepted: int


def copied_rounds(
    prompt: Sequence[int],
    output: Sequence[int],
    controller: Controller,
    predicted: Sequence[int] | None,
    verify: Callable[[CopiedRound], float] | None = None,
) -> Iterator[CopiedRound]:
    """Decode an output by lookup, with a prediction if there is one; yield its rounds.

    verify: verifies each round and returns its time in milliseconds, from which the controller learns.
    """
    source, control = LookupDrafts(), controller.session(LOOKUP)
    prediction = None if predicted is None else Prediction(len(prompt), predicted)
    whole, length = [*prompt, *output], len(prompt)
    while length < len(whole):
        began = control.begin(len(whole) - length - 1, 0.0)
        request = DraftRequest("edit", whole[:length], Sampling(), began, (LOOKUP,), None, len(prompt), prediction)
        (draft,) = source.propose([request])
        accepted = 0
        while accepted < len(draft.tokens) and draft.tokens[accepted] == whole[length + accepted]:
            accepted += 1
        done = CopiedRound(length, tuple(draft.tokens), accepted)
        kept = len(draft.tokens)
        if verify is not None:
            took_ms = verify(done)
            control.times.learn_round(kept, took_ms, took_ms, 0.0, kept + 1)
        bonus = whole[length + accepted]
        seen = accepted == kept and draft.dropped is not None
        control.settle(began, kept, accepted, draft.dropped == bonus if seen else None)
        yield done
        length += accepted + 1
    source.close("edit")
