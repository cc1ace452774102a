"""Batch policies: the choice of pending rounds that make up a verifier's next batch.

    sled    static batches, first come first served (SLED, arXiv 2506.09397)
    fcfs    first come first served
    edf     earliest deadline first
    wisp    urgent rounds by deadline, the rest by tokens per time (WISP, arXiv 2601.11652)
    wisp+   the same for single draft tokens, with prompts in chunks that leave other rounds their slack (ours)
    adaserve
            draft tokens first for sessions that need them, then the likeliest (AdaServe, arXiv 2501.12162)

Every policy gets the verifier's queue, its cost model, the limits and the start of the batch. Rounds with equal keys
are ordered by session id, so the order in which messages arrive decides nothing.

A new policy is a subclass of `BatchPolicy` in `POLICIES`. Settings, command lines and tests take its name and traits
from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal

from services.scheduler.core import pacing
from services.scheduler.core.adaserve import AdaServe
from services.scheduler.core.batching import BatchBuilder, BatchPlan
from services.scheduler.core.policy import (
    MOST_MISSED,
    BatchPolicy,
    PolicyOptions,
    PolicyPart,
    Situation,
    slo_reason,
    urgent_rounds,
    wait_reason,
)
from services.scheduler.core.round_queue import Order, QueuedRound, RoundQueue
from services.scheduler.core.wisp_plus import WispPlus

__all__ = ["POLICIES", "PolicyName", "PolicyOptions", "PolicyPart", "Situation", "fill"]


class Sled(BatchPolicy):
    """Static batches of the first rounds to arrive, whole."""

    name = "sled"
    first_come = True
    static = True
    fixed_draft = 4

    def ready_ms(self, queue: RoundQueue, now_ms: float) -> float:
        return pacing.filled_at(queue, self.options.sled_batch, self.options.sled_fill_ms)

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        batch = BatchBuilder(now.verifier, replace(now.limits, max_batch_ms=inf), now.start_ms)
        fill(batch, islice(queue.by("arrival"), self.options.sled_batch), lambda q: wait_reason(q, now), inf)
        return batch.plan(len(queue), queue.by("arrival"))


class InOrder(BatchPolicy):
    """Rounds in one order, as many as fit. Deadlines of the rounds in the batch limit nothing."""

    order: ClassVar[Order]

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        batch = BatchBuilder(now.verifier, now.limits, now.start_ms)
        order = queue.by(self.order, "all", batch.tries_prompts)
        fill(batch, order, lambda q: self.reason(q, now), now.limits.max_batch_ms)
        return batch.plan(len(queue), queue.by(self.order))

    def reason(self, queued: QueuedRound, now: Situation) -> str:
        """Return why the round is in the batch."""
        return slo_reason(queued, now)


class FirstComeFirstServed(InOrder):
    """Rounds in order of arrival."""

    name = "fcfs"
    first_come = True
    order = "arrival"

    def reason(self, queued: QueuedRound, now: Situation) -> str:
        return wait_reason(queued, now)


class EarliestDeadlineFirst(InOrder):
    """Rounds in order of their deadlines."""

    name = "edf"
    order = "deadline"


class Wisp(BatchPolicy):
    """WISP's scheduler: urgent rounds by deadline, then those that bring most tokens for their time, as long as no
    round that was added on time becomes late.

    If nothing is urgent, a batch in order of arrival is built as well, and the one with more tokens per time is taken.
    """

    name = "wisp"
    parts = frozenset({"estimator", "deadlines", "density"})

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        if not self.plays("density"):
            return self._filled(queue, now, "arrival")
        plan = self._filled(queue, now, "density")
        if next(urgent_rounds(queue, now, "all"), None) is None:
            other = self._filled(queue, now, "arrival")
            if other.rate > plan.rate:
                return other
        return plan

    def _filled(self, queue: RoundQueue, now: Situation, rest: Order) -> BatchPlan:
        batch = BatchBuilder(now.verifier, now.limits, now.start_ms)
        order = chain(urgent_rounds(queue, now, "all", batch.tries_prompts), queue.by(rest, "all", batch.tries_prompts))
        fill(batch, order, lambda q: slo_reason(q, now), None)
        return batch.plan(len(queue), queue.by("latest start"))


POLICIES: dict[str, type[BatchPolicy]] = {
    policy.name: policy for policy in (Sled, FirstComeFirstServed, EarliestDeadlineFirst, Wisp, WispPlus, AdaServe)
}
"""The policies by name."""

if TYPE_CHECKING:
    PolicyName = str
else:
    PolicyName = Literal[tuple(POLICIES)]
    """Type of settings that name a policy."""


def fill(
    batch: BatchBuilder,
    order: Iterable[QueuedRound],
    reason: Callable[[QueuedRound], str],
    limit_ms: float | None,
) -> None:
    """Add rounds in order while they fit.

    Rounds that fit as a whole are added first. The room that is left goes to chunks of those that do not, in order, so
    that a long prompt does not delay short rounds. The first round always gets in, at least with the next block of its
    prompt, so that no round waits for ever. limit_ms: time limit in place of the due times of the rounds in the batch.
    """
    cut: dict[str, QueuedRound] = {}
    first = True
    for queued in order:
        if queued in batch or queued.session_id in cut:
            continue
        alone = first and queued.next_block is None
        if not batch.take_round(queued, queued.pending.draft_length, reason(queued), forced=alone):
            cut[queued.session_id] = queued
            if first:
                batch.reserve_block(queued)
            if len(cut) == MOST_MISSED:
                break
        first = False
        if limit_ms is not None:
            batch.limit_ms = limit_ms
    for queued in cut.values():
        batch.take_chunk(queued, reason(queued))
