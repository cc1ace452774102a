"""Batch policies: which of the rounds that wait for a verifier make up its next batch. Pure.

    sled    static batches, first come first served (SLED, arXiv 2506.09397)
    fcfs    first come first served
    edf     earliest deadline first
    wisp    urgent rounds by deadline, the rest by tokens per time (WISP, arXiv 2601.11652)
    wisp+   the same for single draft tokens, with prompts in chunks that leave the others their slack (ours)

Every policy sees the same: the queue of the verifier, its cost model, the limits, and when the batch would start. Equal
keys are ordered by the session's name, so that the order of messages decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import chain, islice
from math import inf
from typing import Literal, Protocol

from services.scheduler.core.batching import Batching, Chosen, Limits, Plan
from services.scheduler.core.pool import VerifierState
from services.scheduler.core.round_queue import Order, Queue, Waiting, Which
from shared import cost

LOOK_PAST = 64
"""Rounds that do not fit after which the others are not tried any more."""
CALM_SHARE = 0.5
"""Share of the others' slack that a prompt may use which is not urgent itself."""

PolicyName = Literal["sled", "fcfs", "edf", "wisp", "wisp+"]
Part = Literal["estimator", "deadlines", "density", "trimming", "chunking", "price", "migration"]


@dataclass(frozen=True)
class Situation:
    """What a batch is planned for."""

    verifier: VerifierState
    limits: Limits
    start_ms: float
    """When it will start, on the scheduler's clock."""
    expected_due_ms: float | None = None
    """The earliest due time of the sessions that will have come back before it ends."""

    @property
    def horizon_ms(self) -> float:
        """A round that has to start before this is urgent: it cannot wait for another batch, which may be the
        longest."""
        return self.start_ms + self.limits.max_batch_ms


class Policy(Protocol):
    """The interface. The queue is not empty, and neither is the plan."""

    def plan(self, queue: Queue, now: Situation) -> Plan:
        """The batch that the verifier should get."""


class Sled:
    """The first `size` rounds to come, whole."""

    def __init__(self, size: int) -> None:
        self.size = size

    def plan(self, queue: Queue, now: Situation) -> Plan:
        batch = Batching(now.verifier, replace(now.limits, max_batch_ms=inf), now.start_ms)
        fill(batch, islice(queue.by("arrival"), self.size), lambda w: _arrived(w, now), inf)
        return batch.plan(len(queue), queue.by("arrival"))


class InOrder:
    """Rounds in one order, as many as fit."""

    def __init__(self, order: Order, reason: Callable[[Waiting, Situation], str]) -> None:
        self._order = order
        self._reason = reason

    def plan(self, queue: Queue, now: Situation) -> Plan:
        batch = Batching(now.verifier, now.limits, now.start_ms)
        # Who is on time is no concern of these policies: only the limits of the batch are.
        fill(
            batch,
            queue.by(self._order, "all", batch.tries_prompts),
            lambda w: self._reason(w, now),
            now.limits.max_batch_ms,
        )
        return batch.plan(len(queue), queue.by(self._order))


class Wisp:
    """WISP's scheduler: urgent rounds by deadline, then those that bring most tokens for their time, as long as no
    round that was added on time becomes late.

    Where nothing is urgent, the order of arrival is tried as well, and the batch with more tokens per time is taken.
    """

    def __init__(self, without: frozenset[Part] = frozenset()) -> None:
        self._by_density = "density" not in without

    def plan(self, queue: Queue, now: Situation) -> Plan:
        plan = self._filled(queue, now, "density" if self._by_density else "arrival")
        if self._by_density and next(_urgent(queue, now, "all"), None) is None:
            other = self._filled(queue, now, "arrival")
            if other.rate > plan.rate:
                return other
        return plan

    def _filled(self, queue: Queue, now: Situation, rest: Order) -> Plan:
        batch = Batching(now.verifier, now.limits, now.start_ms)
        order = chain(_urgent(queue, now, "all", batch.tries_prompts), queue.by(rest, "all", batch.tries_prompts))
        fill(batch, order, lambda w: _reason(w, now), None)
        return batch.plan(len(queue), queue.by("latest start"))


class WispPlus:
    """Ours: the unit is the token.

    1. Urgent rounds, by deadline, each with its one certain token.
    2. The other rounds' certain tokens and all rounds' draft tokens, by expected tokens per time; a draft token only
       where it raises the batch's expected tokens per time (`trimming`). Where one of the urgent is late, rounds that
       can wait do so: each would make the batch longer.
    3. Prompts with what time is left, in chunks: those that are urgent up to the others' slack, the rest up to a share
       of it (`chunking`; without it they compete as rounds do, and what does not fit takes all the time that is left).
    """

    def __init__(self, without: frozenset[Part] = frozenset()) -> None:
        self._by_density = "density" not in without
        self._trims = "trimming" not in without
        self._chunks = "chunking" not in without

    def plan(self, queue: Queue, now: Situation) -> Plan:
        batch = Batching(now.verifier, now.limits, now.start_ms)
        if (prompt := next(_urgent(queue, now, "prompts"), None)) is not None:
            batch.set_aside(prompt)
        self._take_rounds(batch, queue, now)
        self._take_prompts(batch, queue, now)
        if not batch.chosen:
            # Not even the first fits: it goes all the same, or it would wait for ever.
            first = next(queue.by("latest start"))
            if not batch.take_chunk(first, _reason(first, now), forced=True):
                batch.take_round(first, self._certain(first), _reason(first, now), forced=True)
        return batch.plan(len(queue), queue.by("latest start"))

    def _certain(self, waiting: Waiting) -> int:
        """Draft tokens that come with a round in any case."""
        return 0 if self._trims else waiting.pending.draft_length

    def _take_rounds(self, batch: Batching, queue: Queue, now: Situation) -> None:
        which: Which = "rounds" if self._chunks else "all"
        drafts: list[tuple[float, str, Chosen]] = []
        value = 0.0
        missed = 0

        def offer(chosen: Chosen) -> None:
            survival = chosen.pending.survival
            if self._trims and chosen.draft < len(survival):
                heappush(drafts, (-survival[chosen.draft], chosen.waiting.session, chosen))

        def take(waiting: Waiting) -> None:
            nonlocal value, missed
            if batch.take_round(waiting, self._certain(waiting), _reason(waiting, now)):
                value += batch.chosen[-1].value
                offer(batch.chosen[-1])
            else:
                missed += 1

        for waiting in _urgent(queue, now, which):
            take(waiting)
            if missed == LOOK_PAST:
                break
        rest = queue.by("density" if self._by_density else "arrival", which)
        others = (w for w in rest if w.latest_ms >= now.horizon_ms)
        following = None if batch.has_late else next(others, None)
        token_ms = max(1e-6, cost.token_ms(now.verifier.model))
        while following is not None or drafts:
            draft_density = -drafts[0][0] / token_ms if drafts else 0.0
            if following is not None and (1.0 / following.base_ms >= draft_density or not drafts):
                take(following)
                following = next(others, None) if missed < LOOK_PAST else None
                continue
            _, _, chosen = heappop(drafts)
            worth = chosen.pending.survival[chosen.draft]
            if batch.take_token(chosen, value, now.verifier.gap_ms):
                value += worth
                offer(chosen)
            else:
                drafts.clear()  # the others are worth less, and no cheaper
        for chosen in batch.chosen:
            drafted = chosen.pending.draft_length
            if chosen.draft < drafted:
                chosen.reason += f"; {chosen.draft} of {drafted} draft tokens"

    def _take_prompts(self, batch: Batching, queue: Queue, now: Situation) -> None:
        calm_ms = batch.limit_ms
        if self._chunks:
            if batch.limit_ms < now.limits.max_batch_ms:
                calm_ms = CALM_SHARE * batch.limit_ms
            if now.expected_due_ms is not None:
                calm_ms = min(calm_ms, CALM_SHARE * max(0.0, batch.slack_ms(now.expected_due_ms)))
        for waiting in queue.by("latest start", "prompts"):
            if waiting in batch:
                continue
            urgent = waiting.latest_ms < now.horizon_ms
            limit_ms = batch.limit_ms if urgent else calm_ms
            reason = _reason(waiting, now)
            if not (
                batch.take_round(waiting, self._certain(waiting), reason, limit_ms=limit_ms)
                or batch.take_chunk(waiting, reason, limit_ms=limit_ms)
            ) and not (urgent and batch.tries_prompts()):
                break
        batch.release_aside()


def policy_of(name: PolicyName, sled_batch: int, without: frozenset[Part] = frozenset()) -> Policy:
    """The policy of this name. sled_batch: rounds in a batch of `sled`. without: parts of `wisp` and `wisp+` to leave
    out."""
    match name:
        case "sled":
            return Sled(sled_batch)
        case "fcfs":
            return InOrder("arrival", _arrived)
        case "edf":
            return InOrder("deadline", _reason)
        case "wisp":
            return Wisp(without)
        case "wisp+":
            return WispPlus(without)


def fill(batch: Batching, order: Iterable[Waiting], reason: Callable[[Waiting], str], limit_ms: float | None) -> None:
    """Add rounds in order while they fit.

    Rounds that fit as a whole come first, and the room that they leave goes to chunks of those that do not, in order: a
    long prompt does not hold up short rounds. The first round always gets in, at least with the next block of its
    prompt, so that nothing waits for ever. limit_ms: holds in place of the deadlines of those in the batch.
    """
    cut: dict[str, Waiting] = {}
    first = True
    for waiting in order:
        if waiting in batch or waiting.session in cut:
            continue
        alone = first and waiting.next_block is None
        if not batch.take_round(waiting, waiting.pending.draft_length, reason(waiting), forced=alone):
            cut[waiting.session] = waiting
            if first:
                batch.set_aside(waiting)
            if len(cut) == LOOK_PAST:
                break
        first = False
        if limit_ms is not None:
            batch.limit_ms = limit_ms
    for waiting in cut.values():
        batch.take_chunk(waiting, reason(waiting))


def _urgent(
    queue: Queue, now: Situation, which: Which, prompts_while: Callable[[], bool] = lambda: True
) -> Iterator[Waiting]:
    for waiting in queue.by("latest start", which, prompts_while):
        if waiting.latest_ms >= now.horizon_ms:
            break
        yield waiting


def _arrived(waiting: Waiting, now: Situation) -> str:
    return f"waited {now.start_ms - waiting.pending.arrived_ms:.0f} ms"


def _reason(waiting: Waiting, now: Situation) -> str:
    due_ms = waiting.pending.due_ms
    urgent = "urgent, " if waiting.latest_ms < now.horizon_ms else ""
    if due_ms is None:
        return f"{urgent}no SLO, {_arrived(waiting, now)}"
    left_ms = due_ms - now.start_ms
    when = f"due in {left_ms:.0f} ms" if left_ms >= 0 else f"late by {-left_ms:.0f} ms"
    return f"{urgent}{when}, {waiting.value / waiting.own_ms:.3f} tokens/ms"
