"""Pending rounds of one verifier, kept in the orders in which policies take them.

Adding and removing a round costs O(log n) comparisons. A decision looks at the rounds that it takes and at few others,
however many are pending.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile
from typing import Literal

from services.scheduler.core.mutable_shape import MutableShape
from services.scheduler.core.pool import PendingRound
from shared import cost
from shared.kernels.layout import BLOCK
from shared.messages import CostModel

TYPICAL_JOBS = 8
"""A round's own time is predicted in a batch with this many similar rounds; alone it would pay for the weights."""


@dataclass(frozen=True)
class QueuedRound:
    """A pending round, and its costs on the verifier of this queue."""

    pending: PendingRound
    held: int
    """Tokens in the verifier's cache, which need not be computed."""
    own_ms: float
    """Time that the round adds to a batch, with its whole prompt and draft."""
    base_ms: float
    """The same without its draft."""
    latest_ms: float
    """When its batch should start at the latest: its deadline less its own time."""
    deadline_ms: float

    @property
    def session_id(self) -> str:
        """Id of the round's session."""
        return self.pending.session_id

    @property
    def base(self) -> int:
        """Tokens to compute beside the draft: the prompt tokens not in the cache, and the last committed token."""
        return self.pending.verify.base_len - self.held

    @property
    def next_block(self) -> int | None:
        """Earliest possible end of the next chunk of its prompt; None if less than a block is left."""
        boundary = (self.held // BLOCK + 1) * BLOCK
        return boundary if boundary < self.pending.verify.base_len else None

    @property
    def is_prompt(self) -> bool:
        """True if it needs more tokens than fit one block, so that it may be computed in chunks."""
        return self.base > BLOCK and self.next_block is not None

    @property
    def value(self) -> float:
        """Tokens that the round is expected to bring."""
        return 1.0 + sum(self.pending.survival)


Order = Literal["arrival", "deadline", "latest start", "density"]
Kind = Literal["all", "rounds", "prompts"]

KEYS: dict[Order, Callable[[QueuedRound], float]] = {
    "arrival": lambda queued: queued.pending.arrived_ms,
    "deadline": lambda queued: queued.deadline_ms,
    "latest start": lambda queued: queued.latest_ms,
    "density": lambda queued: -queued.value / queued.own_ms,
}
"""Sort key of each order; the least comes first. Density is expected tokens per own time."""


def queued_round(model: CostModel, pending: PendingRound, cached: int, max_wait_ms: float) -> QueuedRound:
    """Return the round for a verifier with this model that has `cached` of the session's tokens in its cache."""
    held = pending.held(cached)
    base_len, draft = pending.verify.base_len, pending.draft_length
    base_ms = added_ms(model, base_len - held, base_len, 1)
    own_ms = base_ms if not draft else added_ms(model, base_len - held + draft, base_len + draft, draft + 1)
    deadline = pending.deadline_ms(max_wait_ms)
    return QueuedRound(pending, held, own_ms, base_ms, deadline - own_ms, deadline)


def added_ms(model: CostModel, new: int, length: int, rows: int) -> float:
    """Return what a job adds to the time of a batch of `TYPICAL_JOBS` two-token rounds of the job's own length."""
    jobs = TYPICAL_JOBS
    others = MutableShape(jobs, 2 * jobs, 2 * jobs * length, jobs * length, 2 * jobs)
    before_ms = cost.predict_ms(model, others)
    others.add(new, length, rows)
    return max(1e-3, cost.predict_ms(model, others) - before_ms)


class RoundQueue:
    """Pending rounds of one verifier. Prompts have their own orders, because there may be many that are not tried."""

    def __init__(self) -> None:
        self.rounds: dict[str, QueuedRound] = {}
        """The queued rounds, by session."""
        self.work_ms = 0.0
        """Sum of the rounds' own times."""
        self.rounds_ms = 0.0
        """The same without prompts."""
        self.short_tokens = 0
        """Tokens to compute for all rounds but prompts, without their drafts."""
        self._short = _Orders()
        self._prompts = _Orders()

    def __len__(self) -> int:
        return len(self.rounds)

    def add(self, queued: QueuedRound) -> None:
        """Add a round of a session that has none here yet."""
        self.rounds[queued.session_id] = queued
        self.work_ms += queued.own_ms
        if not queued.is_prompt:
            self.rounds_ms += queued.own_ms
            self.short_tokens += queued.base
        (self._prompts if queued.is_prompt else self._short).add(queued)

    def remove(self, session_id: str) -> QueuedRound | None:
        """Remove and return a session's round; None if it has none here."""
        if (queued := self.rounds.get(session_id)) is None:
            return None
        (self._prompts if queued.is_prompt else self._short).remove(queued)
        del self.rounds[session_id]
        self.work_ms = self.work_ms - queued.own_ms if self.rounds else 0.0
        if not queued.is_prompt:
            self.short_tokens -= queued.base
            self.rounds_ms = self.rounds_ms - queued.own_ms if self.short_tokens else 0.0
        return queued

    def by(
        self, order: Order, kind: Kind = "all", prompts_while: Callable[[], bool] = lambda: True
    ) -> Iterator[QueuedRound]:
        """Iterate over all rounds in this order, or over prompts or other rounds only.

        prompts_while: called before each prompt of kind "all"; no prompt follows once it returns False.
        """
        if kind == "all":
            prompts = takewhile(lambda _: prompts_while(), self._prompts.of[order])
            return self._rounds(merge(self._short.of[order], prompts))
        return self._rounds((self._short if kind == "rounds" else self._prompts).of[order])

    def _rounds(self, order: Iterable[tuple[float, str]]) -> Iterator[QueuedRound]:
        return (self.rounds[session_id] for _, session_id in order)


class _Orders:
    """Sessions sorted by each key, then by id."""

    def __init__(self) -> None:
        self.of: dict[Order, list[tuple[float, str]]] = {order: [] for order in KEYS}

    def add(self, queued: QueuedRound) -> None:
        for order, key in KEYS.items():
            insort(self.of[order], (key(queued), queued.session_id))

    def remove(self, queued: QueuedRound) -> None:
        for order, key in KEYS.items():
            line = self.of[order]
            del line[bisect_left(line, (key(queued), queued.session_id))]
