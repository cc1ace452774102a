"""Batch policies: the choice of pending rounds that make up a verifier's next batch.

    sled    static batches, first come first served (SLED, arXiv 2506.09397)
    fcfs    first come first served
    edf     earliest deadline first
    wisp    urgent rounds by deadline, the rest by tokens per time (WISP, arXiv 2601.11652)
    wisp+   the same for single draft tokens, with prompts in chunks that leave other rounds their slack (ours)

Every policy gets the verifier's queue, its cost model, the limits and the start of the batch. Rounds with equal keys
are ordered by session id, so the order in which messages arrive decides nothing.

A new policy is a subclass of `BatchPolicy` in `POLICIES`. Settings, command lines and tests take its name and traits
from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from services.scheduler.core import pacing
from services.scheduler.core.batching import BatchBuilder, BatchLimits, BatchPlan, ChosenRound
from services.scheduler.core.pool import VerifierState
from services.scheduler.core.round_queue import Kind, Order, QueuedRound, RoundQueue, added_ms
from shared import cost
from shared.kernels.layout import BLOCK

MOST_MISSED = 64
"""No more rounds are tried after this many that did not fit."""
CALM_SHARE = 0.5
"""Share of the other rounds' slack that a prompt may use unless it is urgent itself."""

PolicyPart = Literal[
    "estimator", "deadlines", "density", "trimming", "chunking", "price", "migration", "runs", "copies"
]


@dataclass(frozen=True)
class PolicyOptions:
    """Settings of single policies."""

    sled_batch: int = 8
    """Rounds in a batch of `sled`."""
    sled_fill_ms: float = 50.0
    """Longest time that `sled` waits for a batch to fill."""
    without: frozenset[PolicyPart] = field(default_factory=frozenset)
    """Parts of a policy to leave out, to measure what each brings."""


@dataclass(frozen=True)
class Situation:
    """Verifier, limits and time that a batch is planned for."""

    verifier: VerifierState
    limits: BatchLimits
    start_ms: float
    """When the batch will start, on the scheduler's clock."""
    expected_due_ms: float | None = None
    """Earliest due time of the sessions that will have come back before the batch ends."""
    runs_due_ms: Sequence[float] = ()
    """Times by which the step should end for the sessions in runs."""

    @property
    def horizon_ms(self) -> float:
        """Latest start of an urgent round: it cannot wait for the batch after this one, which may be the longest."""
        return self.start_ms + self.limits.max_batch_ms


class BatchPolicy(ABC):
    """Base class of the policies. The class attributes are the policy's traits."""

    name: ClassVar[str]
    """Name in settings, messages and metrics."""
    first_come: ClassVar[bool] = False
    """True if a round waits for all that came before it, whatever their SLOs."""
    static: ClassVar[bool] = False
    """True if batches are static: none is prepared behind another, and none waits for returning sessions."""
    parts: ClassVar[frozenset[PolicyPart]] = frozenset()
    """Parts of the policy that `PolicyOptions.without` may leave out."""

    def __init__(self, options: PolicyOptions) -> None:
        self.options = options

    def plays(self, part: PolicyPart) -> bool:
        """Return whether the policy has this part and it is not left out."""
        return part in self.parts and part not in self.options.without

    def ready_ms(self, queue: RoundQueue, now_ms: float) -> float:
        """Return when the next batch of an idle verifier may be planned at the earliest."""
        return now_ms

    @abstractmethod
    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        """Return the next batch from a queue that is not empty. The batch is not empty either."""


class Sled(BatchPolicy):
    """Static batches of the first rounds to arrive, whole."""

    name = "sled"
    first_come = True
    static = True

    def ready_ms(self, queue: RoundQueue, now_ms: float) -> float:
        return pacing.filled_at(queue, self.options.sled_batch, self.options.sled_fill_ms)

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        batch = BatchBuilder(now.verifier, replace(now.limits, max_batch_ms=inf), now.start_ms)
        fill(batch, islice(queue.by("arrival"), self.options.sled_batch), lambda q: _wait_reason(q, now), inf)
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
        return _slo_reason(queued, now)


class FirstComeFirstServed(InOrder):
    """Rounds in order of arrival."""

    name = "fcfs"
    first_come = True
    order = "arrival"

    def reason(self, queued: QueuedRound, now: Situation) -> str:
        return _wait_reason(queued, now)


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
        if next(_urgent(queue, now, "all"), None) is None:
            other = self._filled(queue, now, "arrival")
            if other.rate > plan.rate:
                return other
        return plan

    def _filled(self, queue: RoundQueue, now: Situation, rest: Order) -> BatchPlan:
        batch = BatchBuilder(now.verifier, now.limits, now.start_ms)
        order = chain(_urgent(queue, now, "all", batch.tries_prompts), queue.by(rest, "all", batch.tries_prompts))
        fill(batch, order, lambda q: _slo_reason(q, now), None)
        return batch.plan(len(queue), queue.by("latest start"))


class WispPlus(BatchPolicy):
    """WISP with the token as the unit (ours).

    1. Urgent rounds, by deadline, each with its one certain token.
    2. The other rounds' certain tokens and all rounds' draft tokens, by expected tokens per time. A draft token is
       added only if it raises the batch's expected tokens per time (`trimming`). If an urgent round is late, rounds
       that can wait do so, because each would make the batch longer.
    3. Prompts in the time that is left, in chunks: urgent ones up to the other rounds' slack, the rest up to a share
       of it (`chunking`). Without chunking, prompts compete like rounds, and one that does not fit takes all the time
       that is left.

    Sessions whose drafts do not pay are decoded in runs (`runs`): each is a row of every step, and draft tokens compete
    with these rows' certain tokens. In steps without a batch the verifier drafts for them by prompt lookup (`copies`).
    No step takes longer than a run can make up for (`VerifierState.runs_due_ms`),
    unless prompts need the time to come in time themselves.

    Prompts are taken by deadline. A prompt is urgent if, behind those with earlier deadlines, it cannot wait for the
    batch after this one. The next block of the first urgent one has its time and memory reserved before anything is
    added, so that late rounds never keep prompts waiting. Rounds that are on time with this block in the batch stay on
    time.
    """

    name = "wisp+"
    parts = frozenset(get_args(PolicyPart))

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        batch = BatchBuilder(now.verifier, now.limits, now.start_ms)
        urgent = _urgent_prompts(queue, now, batch.predicted_ms)
        if urgent.rounds:
            batch.reserve_block(urgent.rounds[0])
        self._take_rounds(batch, queue, now, urgent.needed_ms)
        self._take_prompts(batch, queue, now, {queued.session_id for queued in urgent.rounds})
        if not batch.chosen:
            # Not even the first round fits. It is sent all the same, or it would wait for ever.
            first = next(queue.by("latest start"))
            if not batch.take_chunk(first, _slo_reason(first, now), forced=True):
                batch.take_round(first, self._certain(first), _slo_reason(first, now), forced=True)
        return batch.plan(len(queue), queue.by("latest start"))

    def _certain(self, queued: QueuedRound) -> int:
        """Return the draft tokens that are added together with a round."""
        return 0 if self.plays("trimming") else queued.pending.draft_length

    def _take_rounds(self, batch: BatchBuilder, queue: RoundQueue, now: Situation, prompts_ms: float) -> None:
        """Add rounds and draft tokens. prompts_ms: time that prompts need of this step."""
        kind: Kind = "rounds" if self.plays("chunking") else "all"
        fill_up = _TokenFill(batch, now, self._certain)
        urgent = _urgent(queue, now, kind)
        if (first := next(urgent, None)) is not None:
            fill_up.take_round(first)
        # Only now, or runs that are due with every step would keep the first urgent round waiting for ever.
        batch.keep_on_time(now.runs_due_ms, prompts_ms)
        for queued in urgent:
            fill_up.take_round(queued)
            if fill_up.missed == MOST_MISSED:
                break
        rest = queue.by("density" if self.plays("density") else "arrival", kind)
        others = (q for q in rest if q.latest_ms >= now.horizon_ms)
        fill_up.take_by_density(iter(()) if batch.has_late else others)
        for chosen in batch.chosen:
            drafted = chosen.pending.draft_length
            if chosen.draft < drafted:
                chosen.reason += f"; {chosen.draft} of {drafted} draft tokens"

    def _take_prompts(
        self, batch: BatchBuilder, queue: RoundQueue, now: Situation, urgent_ids: Collection[str]
    ) -> None:
        calm_ms = batch.limit_ms
        if self.plays("chunking"):
            if batch.limit_ms < now.limits.max_batch_ms:
                calm_ms = CALM_SHARE * batch.limit_ms
            if now.expected_due_ms is not None:
                calm_ms = min(calm_ms, CALM_SHARE * max(0.0, batch.slack_ms(now.expected_due_ms)))
        for queued in queue.by("deadline", "prompts"):
            if queued in batch:
                continue
            urgent = queued.session_id in urgent_ids
            limit_ms = batch.limit_ms if urgent else calm_ms
            reason = _slo_reason(queued, now)
            if not (
                batch.take_round(queued, self._certain(queued), reason, limit_ms=limit_ms)
                or batch.take_chunk(queued, reason, limit_ms=limit_ms)
            ) and not (urgent and batch.tries_prompts()):
                break
        batch.release_reserved()


class _TokenFill:
    """Fills a batch with rounds and single draft tokens, which compete by expected tokens per time."""

    def __init__(self, batch: BatchBuilder, now: Situation, certain: Callable[[QueuedRound], int]) -> None:
        """certain: returns the draft tokens that are added together with a round."""
        self._batch = batch
        self._now = now
        self._certain = certain
        self._value = float(len(now.verifier.runs))
        """Tokens that the step is expected to bring: one of each run, and those of the batch."""
        self._drafts: list[tuple[float, str, ChosenRound]] = []
        """Heap of the rounds with draft tokens left, the likeliest next token first."""
        self.missed = 0
        """Rounds that did not fit."""

    def take_round(self, queued: QueuedRound) -> None:
        """Add a round if it fits."""
        if self._batch.take_round(queued, self._certain(queued), _slo_reason(queued, self._now)):
            chosen = self._batch.chosen[-1]
            self._value += chosen.value
            self._offer(chosen)
        else:
            self.missed += 1

    def take_by_density(self, others: Iterator[QueuedRound]) -> None:
        """Add these rounds and the draft tokens of all rounds, the most expected tokens per time first."""
        following = next(others, None)
        token_ms = max(1e-6, cost.token_ms(self._now.verifier.model))
        while following is not None or self._drafts:
            draft_density = -self._drafts[0][0] / token_ms if self._drafts else 0.0
            if following is not None and (1.0 / following.base_ms >= draft_density or not self._drafts):
                self.take_round(following)
                following = next(others, None) if self.missed < MOST_MISSED else None
            else:
                self._take_token()

    def _offer(self, chosen: ChosenRound) -> None:
        survival = chosen.pending.survival
        if chosen.draft < len(survival):
            heappush(self._drafts, (-survival[chosen.draft], chosen.session_id, chosen))

    def _take_token(self) -> None:
        _, _, chosen = heappop(self._drafts)
        worth = chosen.pending.survival[chosen.draft]
        if self._batch.take_token(chosen, self._value, self._now.verifier.gap_ms):
            self._value += worth
            self._offer(chosen)
        else:
            self._drafts.clear()  # the others bring less and cost no less


POLICIES: dict[str, type[BatchPolicy]] = {
    policy.name: policy for policy in (Sled, FirstComeFirstServed, EarliestDeadlineFirst, Wisp, WispPlus)
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


def _urgent(
    queue: RoundQueue, now: Situation, kind: Kind, prompts_while: Callable[[], bool] = lambda: True
) -> Iterator[QueuedRound]:
    for queued in queue.by("latest start", kind, prompts_while):
        if queued.latest_ms >= now.horizon_ms:
            break
        yield queued


@dataclass(frozen=True)
class _UrgentPrompts:
    """Prompts that cannot wait for the batch after this one."""

    rounds: list[QueuedRound]
    """In order of their deadlines."""
    needed_ms: float
    """Time of a step for prompts with which all of them come in time, beside the runs."""


def _urgent_prompts(queue: RoundQueue, now: Situation, runs_ms: float) -> _UrgentPrompts:
    """Return the urgent prompts: a prompt starts only when those with earlier deadlines are computed.

    runs_ms: time of a step with the runs alone, which each block of a prompt beside them takes as well.
    """
    block_ms = added_ms(now.verifier.model, BLOCK, BLOCK, 0)
    prompts = list(islice(queue.by("deadline", "prompts"), MOST_MISSED))
    work_ms, share, urgent = 0.0, 0.0, 0
    for count, queued in enumerate(prompts, 1):
        work_ms += queued.own_ms
        if queued.deadline_ms - work_ms * (1.0 + runs_ms / block_ms) < now.horizon_ms:
            urgent = count
        if queued.pending.due_ms is not None:
            left_ms = queued.deadline_ms - now.start_ms
            share = max(share, work_ms / left_ms if left_ms > work_ms else 1.0)
    needed_ms = runs_ms * share / (1.0 - share) if share < 1.0 else inf
    return _UrgentPrompts(prompts[:urgent], needed_ms if urgent else 0.0)


def _wait_reason(queued: QueuedRound, now: Situation) -> str:
    return f"waited {now.start_ms - queued.pending.arrived_ms:.0f} ms"


def _slo_reason(queued: QueuedRound, now: Situation) -> str:
    due_ms = queued.pending.due_ms
    urgent = "urgent, " if queued.latest_ms < now.horizon_ms else ""
    if due_ms is None:
        return f"{urgent}no SLO, {_wait_reason(queued, now)}"
    left_ms = due_ms - now.start_ms
    when = f"due in {left_ms:.0f} ms" if left_ms >= 0 else f"late by {-left_ms:.0f} ms"
    return f"{urgent}{when}, {queued.value / queued.own_ms:.3f} tokens/ms"
