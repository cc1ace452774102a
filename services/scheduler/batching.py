"""Filling one batch from ordered rounds, within the limits that the cost model checks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.policies import Ordered
from services.scheduler.pool import Pending, VerifierState
from shared import cost
from shared.messages import BatchShape, CostModel

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

    Rounds that fit as a whole come first, and the room that they leave goes to chunks of those that do not, in order:
    a long prompt does not hold up short rounds. The first round in order always gets in, at least with the next block
    of its prompt, so that nothing waits forever.
    """
    room = _Room(verifier.model, limits)
    needs = [_Need(pending, reason, verifier.cached.get(pending.session, 0)) for pending, reason in ordered]
    chosen: list[Chosen] = []
    cut: list[_Need] = []
    for i, need in enumerate(needs):
        first = i == 0
        if room.fits(need.new, need.length) or (first and need.next_block is None):
            room.take(need.new, need.length)
            chosen.append(Chosen(need.pending, None, need.reason))
            continue
        cut.append(need)
        if first:
            room.set_aside(need)
    for need in cut:
        prefill_to = room.furthest(need)
        if prefill_to is not None:
            room.take(prefill_to - need.held, prefill_to)
            chosen.append(Chosen(need.pending, prefill_to, need.reason))
    return Plan(chosen, room.shape, cost.predict_ms(verifier.model, room.shape), full=bool(cut))


class _Need:
    """What a round needs of a batch: tokens to compute, the length after them, the prompt's next block boundary."""

    def __init__(self, pending: Pending, reason: str, cached: int) -> None:
        self.pending = pending
        self.reason = reason
        self.held = pending.held(cached)
        self.new = pending.new_tokens(cached)
        self.length = pending.length_after
        boundary = (self.held // CHUNK + 1) * CHUNK
        self.next_block = boundary if boundary < pending.verify.base_len else None


class _Room:
    """What is left of one batch's limits."""

    def __init__(self, model: CostModel, limits: Limits) -> None:
        self.shape = cost.EMPTY
        self._model = model
        self._limits = limits
        self._aside: _Need | None = None

    def fits(self, new: int, length: int) -> bool:
        """Whether this much more stays within the limits."""
        grown = _grow(self._planned(), new, length)
        in_time = cost.predict_ms(self._model, grown) <= self._limits.max_batch_ms
        return in_time and grown.new_tokens <= self._limits.max_batch_tokens

    def take(self, new: int, length: int) -> None:
        """Use this much up."""
        self.shape = _grow(self.shape, new, length)

    def set_aside(self, need: _Need) -> None:
        """Keep room for the next block of this round's prompt, whatever else is taken."""
        self._aside = need

    def furthest(self, need: _Need) -> int | None:
        """The furthest block boundary of the prompt that fits, by bisection; None if not even the next one does."""
        first = need.next_block
        if first is None:
            return None
        if need is self._aside:
            self._aside = None
        elif not self.fits(first - need.held, first):
            return None
        low, high = first // CHUNK, (need.pending.verify.base_len - 1) // CHUNK
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(middle * CHUNK - need.held, middle * CHUNK):
                low = middle
            else:
                high = middle - 1
        return low * CHUNK

    def _planned(self) -> BatchShape:
        aside = self._aside
        if aside is None or aside.next_block is None:
            return self.shape
        return _grow(self.shape, aside.next_block - aside.held, aside.next_block)


def _grow(shape: BatchShape, new: int, length: int) -> BatchShape:
    return cost.grow(shape, new, length, 1)
