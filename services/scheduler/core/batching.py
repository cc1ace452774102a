"""A batch under construction: its rounds, and the limits that each further round is checked against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from services.scheduler.core.pool import PendingRound, VerifierState
from services.scheduler.core.round_queue import QueuedRound
from services.scheduler.core.verifier_runs import whole_blocks
from shared import cost
from shared.kernels.layout import BLOCK
from shared.messages import CostModel, LeftOut

PROMPTS_MISSED = 4
"""No more prompts are tried after this many that did not fit: there may be thousands, and all are long."""
MOST_LEFT_OUT = 8
"""Most left-out rounds that a batch names."""
HIDDEN_SHARE = 0.5
"""Where a token below the model's knee costs less than this share of one above it, loading the weights hides its
arithmetic, as on an accelerator."""
LEAST_HIDDEN = BLOCK
"""Least number of tokens that an accelerator hides. A CPU hides a few as well, too few to compute prompts by."""


def hidden_tokens(model: CostModel) -> int:
    """Return how many tokens of a step are computed in the time in which the weights are loaded anyway.

    0 on a CPU. A model of a few measurements may have no such time.
    """
    if cost.fixed_ms(model) <= 0 or model.knee < LEAST_HIDDEN:
        return 0
    return model.knee if cost.token_ms(model, 0.0) < HIDDEN_SHARE * cost.token_ms(model) else 0


@dataclass(frozen=True)
class BatchLimits:
    """Limits of one batch, and the longest time before a round goes ahead of all that arrive after it."""

    max_batch_ms: float
    max_batch_tokens: int
    max_wait_ms: float = 3000.0


@dataclass
class ChosenRound:
    """A round in the batch: with `draft` tokens of its draft, or with a chunk of its prompt."""

    queued: QueuedRound
    reason: str
    draft: int
    prefill_to: int | None = None

    @property
    def pending(self) -> PendingRound:
        """The pending round."""
        return self.queued.pending

    @property
    def session_id(self) -> str:
        """Id of the round's session."""
        return self.queued.session_id

    @property
    def value(self) -> float:
        """Tokens that it is expected to bring."""
        return 0.0 if self.prefill_to is not None else 1.0 + sum(self.pending.survival[: self.draft])


@dataclass(frozen=True)
class BatchPlan:
    """Rounds that a policy puts into one batch."""

    chosen: list[ChosenRound]
    predicted_ms: float
    full: bool
    """True if a round, not counting prompts, did not fit."""
    waiting: int = 0
    """Pending rounds that are not in it."""
    left_out: list[LeftOut] = field(default_factory=list)
    """The first of these, each with the reason."""

    @property
    def rate(self) -> float:
        """Expected tokens per predicted millisecond."""
        return sum(chosen.value for chosen in self.chosen) / max(self.predicted_ms, 1e-6)


class BatchBuilder:
    """Builds one batch, round by round.

    A round that is on time when it is added stays on time: nothing is added later that would make the batch end, by
    the cautious prediction, after the round's token is due.
    """

    def __init__(self, verifier: VerifierState, limits: BatchLimits, start_ms: float) -> None:
        """start_ms: when the batch will start, on the scheduler's clock."""
        self.start_ms = start_ms
        self.chosen: list[ChosenRound] = []
        self._runs_ms = self.predicted_ms = cost.predict_ms(verifier.model, verifier.runs.shape)
        """Predicted time of the batch as it is, with a token of each of the verifier's runs."""
        self.full = False
        """True if a round, not counting prompts, did not fit."""
        self.has_late = False
        """True if a round in it has an SLO and will be late."""
        self.limit_ms = limits.max_batch_ms
        """Longest predicted time that the batch may reach."""
        self.rounds_limit_ms = inf
        """The part of `limit_ms` that its own rounds set: the shortest slack of those that are on time."""
        self.token_price_ms = 0.0
        """Least cost of a draft token: that of the prompt token whose place it takes, where prompts are pending."""
        self.hidden_tokens = hidden_tokens(verifier.model)
        """See `hidden_tokens`."""
        self.hidden_ms = cost.fixed_ms(verifier.model) + cost.token_ms(verifier.model, 0.0) * self.hidden_tokens
        """Time of a step of as many tokens."""
        self._most_tokens = limits.max_batch_tokens
        self._cache_tokens = verifier.heartbeat.total_tokens
        self.model = verifier.model
        self._caution = max(1.0, verifier.model.ratio_p90)
        self._shape = verifier.runs.shape.copy()
        self._reserved: dict[str, tuple[int, int, int]] = {}
        """Jobs for which room is reserved, by session."""
        self._missed_prompts = 0
        self._used_tokens = verifier.runs.cache_tokens
        """Tokens of the cache that the sessions of the batch and of the runs fill."""
        self._taken: set[str] = set()
        self._missed: dict[str, str] = {}

    def __contains__(self, queued: QueuedRound) -> bool:
        return queued.session_id in self._taken

    def tries_prompts(self) -> bool:
        """Return whether to try more prompts: not after several that did not fit."""
        return self._missed_prompts < PROMPTS_MISSED

    @property
    def tokens(self) -> int:
        """Tokens of the step: those of the batch, of the reservations and of the runs."""
        return self._shape.new_tokens

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the reservations."""
        return sum(new for new, _, _ in self._reserved.values())

    def slack_ms(self, due_ms: float) -> float:
        """Return the longest predicted time of a batch that, with caution, ends before `due_ms`."""
        return (due_ms - self.start_ms) / self._caution

    def keep_on_time(self, due_ms: Iterable[float], needed_ms: float) -> None:
        """Add nothing that makes the batch end after one of these times.

        Times that do not leave room for `needed_ms` beside the runs, or that the batch misses already, limit nothing.
        """
        least_ms = max(self.predicted_ms, self._runs_ms + needed_ms)
        kept = (slack_ms for due in due_ms if (slack_ms := self.slack_ms(due)) >= least_ms)
        self.limit_ms = min(self.limit_ms, min(kept, default=inf))

    def has_time_beside(self, prompt: QueuedRound, queued: QueuedRound, draft: int) -> bool:
        """Return whether a round with `draft` tokens of its draft fits the batch's time beside a block of a prompt."""
        if (block := prompt.next_block) is None:
            return True
        job = (block - prompt.held, block, 0)
        self._shape.add(*job)
        grown_ms = self._grown_ms(_whole(queued, draft))
        self._shape.remove(*job)
        return grown_ms <= self.limit_ms

    def take_round(
        self,
        queued: QueuedRound,
        draft: int,
        reason: str,
        *,
        limit_ms: float | None = None,
        overtime: bool = False,
        forced: bool = False,
    ) -> bool:
        """Add a whole round with the first `draft` tokens of its draft if it fits; return whether it was added.

        If the round is on time, its due time limits what is added later. The room reserved for it is released with it.
        limit_ms: a tighter time limit for this round. overtime: add it whatever the time limit is. forced: add it
        whatever the limits are.
        """
        job = _whole(queued, draft)
        reserved = self._release(queued.session_id)
        grown_ms = self._grown_ms(job)
        limit_ms = self.limit_ms if limit_ms is None else min(limit_ms, self.limit_ms)
        if not forced and not (
            self._has_room(queued, job[0], queued.pending.length_after)
            and (overtime or self._has_time(queued, grown_ms, limit_ms))
        ):
            if reserved:
                self.reserve(queued, reserved)
            return False
        self._add(job, grown_ms, ChosenRound(queued, reason, draft), queued.pending.length_after)
        due_ms = queued.pending.due_ms
        if due_ms is None:
            return True
        if grown_ms <= (slack_ms := self.slack_ms(due_ms)):
            self.limit_ms = min(self.limit_ms, slack_ms)
            self.rounds_limit_ms = min(self.rounds_limit_ms, slack_ms)
        else:
            self.has_late = True
        return True

    def take_token(self, chosen: ChosenRound, value: float, idle_ms: float) -> bool:
        """Add one more draft token of a chosen round if it fits and raises the batch's tokens per time.

        value: tokens that the batch is expected to bring as it is. idle_ms: added to the batch's time.
        """
        queued, draft = chosen.queued, chosen.draft
        new, length = queued.base + draft, queued.pending.verify.base_len + draft
        shape = self._shape
        if shape.new_tokens >= self._most_tokens:
            return False
        shape.remove(new, length, draft + 1)
        shape.add(new + 1, length + 1, draft + 2)
        grown_ms = cost.predict_ms(self.model, shape)
        added_ms = max(grown_ms - self.predicted_ms, self.token_price_ms)
        pays = queued.pending.survival[draft] * (self.predicted_ms + idle_ms) >= value * added_ms
        if not pays or grown_ms > self.limit_ms:
            shape.remove(new + 1, length + 1, draft + 2)
            shape.add(new, length, draft + 1)
            return False
        chosen.draft += 1
        self.predicted_ms = grown_ms
        return True

    def take_chunk(
        self, queued: QueuedRound, reason: str, *, limit_ms: float | None = None, forced: bool = False
    ) -> bool:
        """Add as many blocks of a round's prompt as fit; return whether at least one was added.

        The next block is always added if `forced` or if room was reserved for it.
        """
        reserved = self._release(queued.session_id) > 0
        first = queued.next_block
        if first is None:
            return False
        limit_ms = self.limit_ms if limit_ms is None else min(limit_ms, self.limit_ms)
        low, high = first // BLOCK, (queued.pending.verify.base_len - 1) // BLOCK
        if not (forced or reserved) and not self._has_room(queued, first - queued.held, first):
            return False
        if not self._chunk_fits(queued, first, limit_ms):
            if not (forced or reserved):
                self._miss(queued, f"not even a block of its prompt fits in {limit_ms:.0f} ms")
                return False
            high = low
        while low < high:
            middle = (low + high + 1) // 2
            if self._chunk_fits(queued, middle * BLOCK, limit_ms):
                low = middle
            else:
                high = middle - 1
        self._add_chunk(queued, reason, low * BLOCK)
        return True

    def take_tokens(self, queued: QueuedRound, reason: str, most: int) -> bool:
        """Add up to `most` tokens of a round's prompt if they fit; return whether any was added.

        What room was reserved for is always added.
        """
        least = self._release(queued.session_id)
        high = min(most, queued.base - 1)
        low = min(least, high)
        while low < high:
            middle = (low + high + 1) // 2
            if self._chunk_fits(queued, queued.held + middle, self.limit_ms):
                low = middle
            else:
                high = middle - 1
        if low < 1:
            self._miss(queued, f"no token of its prompt fits in {self.limit_ms:.0f} ms")
            return False
        self._add_chunk(queued, reason, queued.held + low)
        return True

    def _add_chunk(self, queued: QueuedRound, reason: str, prefill_to: int) -> None:
        job = (prefill_to - queued.held, prefill_to, 0)
        self._add(job, self._grown_ms(job), ChosenRound(queued, reason, 0, prefill_to), prefill_to)

    def reserve_block(self, queued: QueuedRound) -> None:
        """Reserve time and memory for the next block of this round's prompt."""
        if (block := queued.next_block) is not None:
            self.reserve(queued, block - queued.held)

    def reserve(self, queued: QueuedRound, tokens: int) -> int:
        """Reserve time and memory for so many tokens of this round's prompt; return for how many.

        The prompt's last token is computed with the round as a whole, so it is not among them. The first reservation
        has at least one token. Those after it have none if the batch's tokens or the cache's memory do not suffice.
        """
        to = queued.held + max(1, min(tokens, queued.base - 1))
        job = (to - queued.held, to, 0)
        if self._reserved and (
            self._shape.new_tokens + job[0] > self._most_tokens
            or self._used_tokens + whole_blocks(to) > self._cache_tokens
        ):
            return 0
        self._reserved[queued.session_id] = job
        self._shape.add(*job)
        self._used_tokens += whole_blocks(to)
        self.predicted_ms = cost.predict_ms(self.model, self._shape)
        return job[0]

    def release_reserved(self) -> None:
        """Release all reserved room."""
        for session_id in tuple(self._reserved):
            self._release(session_id)

    def _release(self, session_id: str) -> int:
        """Release the room reserved for a session's prompt; return the number of its tokens."""
        if (job := self._reserved.pop(session_id, None)) is None:
            return 0
        new, to, _ = job
        self._shape.remove(*job)
        self._used_tokens -= whole_blocks(to)
        self.predicted_ms = cost.predict_ms(self.model, self._shape)
        return new

    def plan(self, pending: int, rest: Iterable[QueuedRound]) -> BatchPlan:
        """Return the batch as it is.

        pending: number of pending rounds, those in the batch included. rest: these rounds, in the policy's order.
        """
        waiting = pending - len(self.chosen)
        most = min(MOST_LEFT_OUT, waiting)
        left_out = [LeftOut(session=session_id, reason=why) for session_id, why in self._missed.items()][:most]
        for queued in rest:
            if len(left_out) >= most:
                break
            if queued.session_id not in self._taken and queued.session_id not in self._missed:
                left_out.append(LeftOut(session=queued.session_id, reason="not its turn"))
        return BatchPlan(list(self.chosen), self.predicted_ms, self.full, waiting, left_out)

    def _miss(self, queued: QueuedRound, reason: str) -> None:
        self._missed_prompts += queued.is_prompt
        self.full = self.full or not queued.is_prompt
        if len(self._missed) < MOST_LEFT_OUT:
            self._missed.setdefault(queued.session_id, reason)

    def _has_room(self, queued: QueuedRound, new: int, length: int) -> bool:
        if self._shape.new_tokens + new > self._most_tokens:
            self._miss(queued, f"the batch would have more than {self._most_tokens} tokens")
            return False
        if self._used_tokens + whole_blocks(length) > self._cache_tokens:
            self._miss(
                queued, f"the sessions of the batch would need more than the {self._cache_tokens} tokens of the cache"
            )
            return False
        return True

    def _has_time(self, queued: QueuedRound, grown_ms: float, limit_ms: float) -> bool:
        if grown_ms > limit_ms:
            self._miss(queued, f"the batch would take {grown_ms:.0f} ms, the limit is {limit_ms:.0f}")
            return False
        return True

    def _chunk_fits(self, queued: QueuedRound, prefill_to: int, limit_ms: float) -> bool:
        new = prefill_to - queued.held
        tokens_fit = self._shape.new_tokens + new <= self._most_tokens
        cache_fits = self._used_tokens + whole_blocks(prefill_to) <= self._cache_tokens
        return tokens_fit and cache_fits and self._grown_ms((new, prefill_to, 0)) <= limit_ms

    def _grown_ms(self, job: tuple[int, int, int]) -> float:
        self._shape.add(*job)
        grown_ms = cost.predict_ms(self.model, self._shape)
        self._shape.remove(*job)
        return grown_ms

    def _add(self, job: tuple[int, int, int], grown_ms: float, chosen: ChosenRound, length: int) -> None:
        self._shape.add(*job)
        self._used_tokens += whole_blocks(length)
        self.predicted_ms = grown_ms
        self._taken.add(chosen.session_id)
        self._missed.pop(chosen.session_id, None)
        self.chosen.append(chosen)


def _whole(queued: QueuedRound, draft: int) -> tuple[int, int, int]:
    """Return the job of a whole round with the first `draft` tokens of its draft: tokens, length after it, rows."""
    return queued.base + draft, queued.pending.verify.base_len + draft, draft + 1
