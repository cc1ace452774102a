"""A batch in the making: what is in it, and what may still come, within the limits that the cost model checks. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.core.mutable_shape import Tally
from services.scheduler.core.pool import BLOCK, Pending, VerifierState
from services.scheduler.core.round_queue import Waiting
from shared import cost
from shared.messages import LeftOut

PROMPTS_MISSED = 4
"""Prompts that do not fit after which no others are tried: there may be thousands, and all are long."""
TOLD = 8
"""Rounds left out that a batch names."""


@dataclass(frozen=True)
class Limits:
    """What one batch may take, and how long a round may wait before it goes before all that arrive after it."""

    max_batch_ms: float
    max_batch_tokens: int
    max_wait_ms: float = 3000.0


@dataclass
class Chosen:
    """A round that got into the batch: with `draft` tokens of its draft, or with a chunk of its prompt."""

    waiting: Waiting
    reason: str
    draft: int
    prefill_to: int | None = None

    @property
    def pending(self) -> Pending:
        """The round."""
        return self.waiting.pending

    @property
    def value(self) -> float:
        """Tokens that it is expected to bring."""
        return 0.0 if self.prefill_to is not None else 1.0 + sum(self.pending.survival[: self.draft])


@dataclass(frozen=True)
class Plan:
    """A batch to be."""

    chosen: list[Chosen]
    predicted_ms: float
    full: bool
    """Whether a round, not counting prompts, did not fit."""
    waiting: int = 0
    """Rounds that are not in it."""
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Expected tokens per predicted millisecond."""
        return sum(chosen.value for chosen in self.chosen) / max(self.predicted_ms, 1e-6)


class Batching:
    """One batch, filled step by step.

    A round that is on time when it is added stays on time: nothing is added after it that would make the batch end,
    by the cautious prediction, later than its token is due.
    """

    def __init__(self, verifier: VerifierState, limits: Limits, start_ms: float) -> None:
        """start_ms: when the batch will start, on the scheduler's clock."""
        self.start_ms = start_ms
        self.chosen: list[Chosen] = []
        self.predicted_ms = 0.0
        """Predicted time of the batch as it is."""
        self.full = False
        """Whether a round, not counting prompts, did not fit."""
        self.has_late = False
        """Whether a round in it has an SLO and will be late."""
        self.limit_ms = limits.max_batch_ms
        """Longest predicted time that it may come to have."""
        self._most_tokens = limits.max_batch_tokens
        self._room = verifier.heartbeat.total_tokens
        self._model = verifier.model
        self._caution = max(1.0, verifier.model.ratio_p90)
        self._tally = Tally()
        self._aside: tuple[Waiting, tuple[int, int, int]] | None = None
        self._missed_prompts = 0
        self._kept = 0
        """Tokens of the cache that the batch's sessions fill."""
        self._taken: set[str] = set()
        self._missed: dict[str, str] = {}

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting.session in self._taken

    def tries_prompts(self) -> bool:
        """Whether prompts are still worth trying: not after several that did not fit."""
        return self._missed_prompts < PROMPTS_MISSED

    def slack_ms(self, due_ms: float) -> float:
        """Longest predicted time of a batch that, with caution, ends before a token is due."""
        return (due_ms - self.start_ms) / self._caution

    def take_round(
        self, waiting: Waiting, draft: int, reason: str, *, limit_ms: float | None = None, forced: bool = False
    ) -> bool:
        """Add a whole round with the first `draft` tokens of its draft, if it fits; it then keeps its deadline, if it
        can.

        limit_ms: a closer limit for this round. forced: whatever the limits say.
        """
        job = (waiting.base + draft, waiting.pending.verify.base_len + draft, draft + 1)
        if not forced and not self._has_room(waiting, job[0], waiting.pending.length_after):
            return False
        grown_ms = self._grown_ms(job)
        limit_ms = self.limit_ms if limit_ms is None else min(limit_ms, self.limit_ms)
        if not forced and grown_ms > limit_ms:
            self._miss(waiting, f"the batch would take {grown_ms:.0f} ms, the limit is {limit_ms:.0f}")
            return False
        self._add(job, grown_ms, Chosen(waiting, reason, draft), waiting.pending.length_after)
        due_ms = waiting.pending.due_ms
        if due_ms is None:
            return True
        if grown_ms <= (slack_ms := self.slack_ms(due_ms)):
            self.limit_ms = min(self.limit_ms, slack_ms)
        else:
            self.has_late = True
        return True

    def take_token(self, chosen: Chosen, value: float, idle_ms: float) -> bool:
        """Verify one more token of a chosen round's draft, if it fits and the batch then brings more tokens per time.

        value: tokens that the batch is expected to bring as it is. idle_ms: counted in with the batch's time.
        """
        waiting, draft = chosen.waiting, chosen.draft
        new, length = waiting.base + draft, waiting.pending.verify.base_len + draft
        tally = self._tally
        if tally.new_tokens >= self._most_tokens:
            return False
        tally.give_back(new, length, draft + 1)
        tally.take(new + 1, length + 1, draft + 2)
        grown_ms = cost.predict_ms(self._model, tally)
        added_ms = grown_ms - self.predicted_ms
        pays = waiting.pending.survival[draft] * (self.predicted_ms + idle_ms) >= value * added_ms
        if not pays or grown_ms > self.limit_ms:
            tally.give_back(new + 1, length + 1, draft + 2)
            tally.take(new, length, draft + 1)
            return False
        chosen.draft += 1
        self.predicted_ms = grown_ms
        return True

    def take_chunk(self, waiting: Waiting, reason: str, *, limit_ms: float | None = None, forced: bool = False) -> bool:
        """Add as many blocks of a round's prompt as fit; at least the next one if `forced` or set aside."""
        aside = self._aside is not None and self._aside[0] is waiting
        if aside:
            self.release_aside()
        first = waiting.next_block
        if first is None:
            return False
        limit_ms = self.limit_ms if limit_ms is None else min(limit_ms, self.limit_ms)
        low, high = first // BLOCK, (waiting.pending.verify.base_len - 1) // BLOCK
        if not (forced or aside) and not self._has_room(waiting, first - waiting.held, first):
            return False
        if not self._chunk_fits(waiting, first, limit_ms):
            if not (forced or aside):
                self._miss(waiting, f"not even a block of its prompt fits in {limit_ms:.0f} ms")
                return False
            high = low
        while low < high:
            middle = (low + high + 1) // 2
            if self._chunk_fits(waiting, middle * BLOCK, limit_ms):
                low = middle
            else:
                high = middle - 1
        job = (low * BLOCK - waiting.held, low * BLOCK, 0)
        self._add(job, self._grown_ms(job), Chosen(waiting, reason, 0, low * BLOCK), low * BLOCK)
        return True

    def set_aside(self, waiting: Waiting) -> None:
        """Keep room for the next block of this round's prompt, whatever else is added."""
        if self._aside is None and (block := waiting.next_block) is not None:
            job = (block - waiting.held, block, 0)
            self._aside = waiting, job
            self._tally.take(*job)
            self.predicted_ms = cost.predict_ms(self._model, self._tally)

    def release_aside(self) -> None:
        """Give back what was set aside."""
        if self._aside is not None:
            self._tally.give_back(*self._aside[1])
            self._aside = None
            self.predicted_ms = cost.predict_ms(self._model, self._tally)

    def plan(self, waiting: int, rest: Iterable[Waiting]) -> Plan:
        """The batch as it is. waiting: rounds that wait in all; rest: these, as the policy would go on."""
        count = waiting - len(self.chosen)
        told = min(TOLD, count)
        left = [LeftOut(session=name, reason=why) for name, why in self._missed.items()][:told]
        for one in rest:
            if len(left) >= told:
                break
            if one.session not in self._taken and one.session not in self._missed:
                left.append(LeftOut(session=one.session, reason="not its turn"))
        return Plan(list(self.chosen), self.predicted_ms, self.full, count, left)

    def _miss(self, waiting: Waiting, reason: str) -> None:
        self._missed_prompts += waiting.is_prompt
        self.full = self.full or not waiting.is_prompt
        if len(self._missed) < TOLD:
            self._missed.setdefault(waiting.session, reason)

    def _has_room(self, waiting: Waiting, new: int, length: int) -> bool:
        if self._tally.new_tokens + new > self._most_tokens:
            self._miss(waiting, f"the batch would have more than {self._most_tokens} tokens")
            return False
        if self._kept + _blocks(length) > self._room:
            self._miss(waiting, f"the sessions of the batch would need more than the {self._room} tokens of the cache")
            return False
        return True

    def _chunk_fits(self, waiting: Waiting, prefill_to: int, limit_ms: float) -> bool:
        new = prefill_to - waiting.held
        within = self._tally.new_tokens + new <= self._most_tokens and self._kept + prefill_to <= self._room
        return within and self._grown_ms((new, prefill_to, 0)) <= limit_ms

    def _grown_ms(self, job: tuple[int, int, int]) -> float:
        self._tally.take(*job)
        grown_ms = cost.predict_ms(self._model, self._tally)
        self._tally.give_back(*job)
        return grown_ms

    def _add(self, job: tuple[int, int, int], grown_ms: float, chosen: Chosen, length: int) -> None:
        self._tally.take(*job)
        self._kept += _blocks(length)
        self.predicted_ms = grown_ms
        self._taken.add(chosen.waiting.session)
        self._missed.pop(chosen.waiting.session, None)
        self.chosen.append(chosen)


def _blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
