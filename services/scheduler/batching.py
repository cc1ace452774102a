"""Filling one batch from ordered rounds, within the limits that the cost model checks. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.scheduler.policies import Ordered
from services.scheduler.pool import Pending, VerifierState
from shared import cost
from shared.messages import BatchShape

CHUNK = 64
"""Prompts are split at multiples of this many tokens, the engine's block size."""


@dataclass(frozen=True)
class Limits:
    """What one batch may take."""

    max_batch_ms: float
    max_batch_tokens: int


@dataclass(frozen=True)
class Chosen:
    """A round that got into the batch, as a whole or (`prefill_to`) with the next chunk of its prompt."""

    pending: Pending
    prefill_to: int | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """A batch to be. `full` says that something that waits did not fit."""

    chosen: list[Chosen]
    shape: BatchShape
    predicted_ms: float
    full: bool


def fill(ordered: Ordered, verifier: VerifierState, limits: Limits) -> Plan:
    """Take rounds in order while the predicted time and the token count stay within the limits.

    A round that does not fit as a whole gets a chunk of its prompt in if there is room for one; later, smaller rounds
    may still fit. The first round always gets in, so nothing waits forever behind a limit.
    """
    chosen: list[Chosen] = []
    shape = cost.shape_of([])
    full = False

    def fits(new: int, length: int) -> bool:
        grown = _grow(shape, new, length)
        in_time = cost.predict_ms(verifier.model, grown) <= limits.max_batch_ms
        return in_time and grown.new_tokens <= limits.max_batch_tokens

    for pending, reason in ordered:
        held = pending.held(verifier.cached.get(pending.session, 0))
        new, length = pending.new_tokens(held), pending.length_after
        prefill_to = None
        if not fits(new, length):
            full = True
            prefill_to = _chunk(held, pending.verify.base_len, fits)
            if prefill_to is None:
                if chosen:
                    continue
                prefill_to = _next_block(held, pending.verify.base_len)
            if prefill_to is not None:
                new, length = prefill_to - held, prefill_to
        chosen.append(Chosen(pending, prefill_to, reason))
        shape = _grow(shape, new, length)
    return Plan(chosen, shape, cost.predict_ms(verifier.model, shape), full)


def _grow(shape: BatchShape, new: int, length: int) -> BatchShape:
    return BatchShape(
        jobs=shape.jobs + 1,
        new_tokens=shape.new_tokens + new,
        new_context=shape.new_context + new * length,
        context=shape.context + length,
    )


def _next_block(held: int, base_len: int) -> int | None:
    """The first block boundary after `held` tokens; None if the prompt ends before it."""
    boundary = (held // CHUNK + 1) * CHUNK
    return boundary if boundary < base_len else None


def _chunk(held: int, base_len: int, fits: Callable[[int, int], bool]) -> int | None:
    """The furthest block boundary before `base_len` that fits, by bisection; None if not even the next one does."""
    first = _next_block(held, base_len)
    if first is None or not fits(first - held, first):
        return None
    low, high = first // CHUNK, (base_len - 1) // CHUNK
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * CHUNK - held, middle * CHUNK):
            low = middle
        else:
            high = middle - 1
    return low * CHUNK
