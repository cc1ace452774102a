"""The base of batch policies: their interface, the situation that they plan for, and what several of them use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, Literal

from services.scheduler.core.batching import BatchLimits, BatchPlan
from services.scheduler.core.pool import VerifierState
from services.scheduler.core.round_queue import Kind, QueuedRound, RoundQueue

MOST_MISSED = 64
"""No more rounds are tried after this many that did not fit."""

PolicyPart = Literal[
    "estimator", "deadlines", "density", "trimming", "chunking", "price", "migration", "runs", "copies", "memory"
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
    promised_ms: float = inf
    """Shortest time per token that a session of the verifier was promised."""

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
    fixed_draft: ClassVar[int | None] = None
    """Tokens of every draft that the policy is measured with; None for drafters' own stop rule."""
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


def urgent_rounds(
    queue: RoundQueue, now: Situation, kind: Kind, prompts_while: Callable[[], bool] = lambda: True
) -> Iterator[QueuedRound]:
    """Return the rounds that cannot wait for the batch after this one, in order of their latest start.

    prompts_while: see `RoundQueue.by`.
    """
    for queued in queue.by("latest start", kind, prompts_while):
        if queued.latest_ms >= now.horizon_ms:
            break
        yield queued


def wait_reason(queued: QueuedRound, now: Situation) -> str:
    """Return why a round is in a batch of a policy that goes by arrival."""
    return f"waited {now.start_ms - queued.pending.arrived_ms:.0f} ms"


def slo_reason(queued: QueuedRound, now: Situation) -> str:
    """Return why a round is in a batch of a policy that goes by SLOs."""
    due_ms = queued.pending.due_ms
    urgent = "urgent, " if queued.latest_ms < now.horizon_ms else ""
    if due_ms is None:
        return f"{urgent}no SLO, {wait_reason(queued, now)}"
    left_ms = due_ms - now.start_ms
    when = f"due in {left_ms:.0f} ms" if left_ms >= 0 else f"late by {-left_ms:.0f} ms"
    return f"{urgent}{when}, {queued.value / queued.own_ms:.3f} tokens/ms"
