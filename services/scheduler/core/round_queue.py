"""The rounds that wait for one verifier, kept in the orders in which policies take them. Pure.

Adding and removing a round costs O(log n) comparisons, so that a decision looks at the rounds that it takes and at few
others, however many wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile
from typing import Literal

from services.scheduler.core.mutable_shape import Tally
from services.scheduler.core.pool import BLOCK, Pending
from shared import cost
from shared.messages import CostModel

TYPICAL_JOBS = 8
"""A round's own time is told in the company of this many like it: alone it would pay for the weights."""


@dataclass(frozen=True)
class Waiting:
    """A round as seen by the verifier that it waits for."""

    pending: Pending
    held: int
    """Tokens that the verifier has in its cache and need not compute."""
    own_ms: float
    """What the round adds to the time of a batch, all of its prompt and draft included."""
    base_ms: float
    """The same without its draft."""
    latest_ms: float
    """When its batch should start at the latest: its deadline less its own time."""
    deadline_ms: float

    @property
    def session(self) -> str:
        """The session's name."""
        return self.pending.session

    @property
    def base(self) -> int:
        """Tokens to compute beside the draft: those of the prompt that are not held, and the last committed one."""
        return self.pending.verify.base_len - self.held

    @property
    def next_block(self) -> int | None:
        """Where the next chunk of its prompt may end at the earliest; None if less than that is left."""
        boundary = (self.held // BLOCK + 1) * BLOCK
        return boundary if boundary < self.pending.verify.base_len else None

    @property
    def is_prompt(self) -> bool:
        """Whether there is more to compute than fits one block: it may go in chunks."""
        return self.base > BLOCK and self.next_block is not None

    @property
    def value(self) -> float:
        """Tokens that the round is expected to bring."""
        return 1.0 + sum(self.pending.survival)


Order = Literal["arrival", "deadline", "latest start", "density"]
Which = Literal["all", "rounds", "prompts"]

KEYS: dict[Order, Callable[[Waiting], float]] = {
    "arrival": lambda waiting: waiting.pending.arrived_ms,
    "deadline": lambda waiting: waiting.deadline_ms,
    "latest start": lambda waiting: waiting.latest_ms,
    "density": lambda waiting: -waiting.value / waiting.own_ms,
}
"""What comes first in each order: the least. Density is expected tokens per own time."""


def seen_by(model: CostModel, pending: Pending, cached: int, max_wait_ms: float) -> Waiting:
    """The round as a verifier with this model sees it that holds `cached` of the session's tokens."""
    held = pending.held(cached)
    base_len, draft = pending.verify.base_len, pending.draft_length
    base_ms = added_ms(model, base_len - held, base_len, 1)
    own_ms = base_ms if not draft else added_ms(model, base_len - held + draft, base_len + draft, draft + 1)
    deadline = pending.deadline_ms(max_wait_ms)
    return Waiting(pending, held, own_ms, base_ms, deadline - own_ms, deadline)


def added_ms(model: CostModel, new: int, length: int, rows: int) -> float:
    """What a job adds to the time of a batch of `TYPICAL_JOBS` rounds of two tokens with the job's own length."""
    company = Tally(TYPICAL_JOBS, 2 * TYPICAL_JOBS, 2 * TYPICAL_JOBS * length, TYPICAL_JOBS * length, 2 * TYPICAL_JOBS)
    alone = cost.predict_ms(model, company)
    company.take(new, length, rows)
    return max(1e-3, cost.predict_ms(model, company) - alone)


class Queue:
    """The rounds that wait for one verifier. Prompts are kept apart, as there may be many that nobody looks at."""

    def __init__(self) -> None:
        self.waiting: dict[str, Waiting] = {}
        self.work_ms = 0.0
        """Sum of the rounds' own times."""
        self._rounds = _Orders()
        self._prompts = _Orders()

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, waiting: Waiting) -> None:
        """Take a round in; its session has none here yet."""
        self.waiting[waiting.session] = waiting
        self.work_ms += waiting.own_ms
        (self._prompts if waiting.is_prompt else self._rounds).add(waiting)

    def remove(self, session: str) -> Waiting | None:
        """Take a session's round out; None if it has none here."""
        if (waiting := self.waiting.get(session)) is None:
            return None
        (self._prompts if waiting.is_prompt else self._rounds).remove(waiting)
        del self.waiting[session]
        self.work_ms = self.work_ms - waiting.own_ms if self.waiting else 0.0
        return waiting

    def by(
        self, order: Order, which: Which = "all", prompts_while: Callable[[], bool] = lambda: True
    ) -> Iterator[Waiting]:
        """What waits, in this order; all of it, or only prompts, or only what is none.

        prompts_while: asked before each prompt among all; no more of them come once it says no.
        """
        if which == "all":
            prompts = takewhile(lambda _: prompts_while(), self._prompts.of[order])
            return self._named(merge(self._rounds.of[order], prompts))
        return self._named((self._rounds if which == "rounds" else self._prompts).of[order])

    def _named(self, order: Iterable[tuple[float, str]]) -> Iterator[Waiting]:
        return (self.waiting[name] for _, name in order)


class _Orders:
    """Names of rounds, by each key and then by name."""

    def __init__(self) -> None:
        self.of: dict[Order, list[tuple[float, str]]] = {order: [] for order in KEYS}

    def add(self, waiting: Waiting) -> None:
        for order, key in KEYS.items():
            insort(self.of[order], (key(waiting), waiting.session))

    def remove(self, waiting: Waiting) -> None:
        for order, key in KEYS.items():
            line = self.of[order]
            del line[bisect_left(line, (key(waiting), waiting.session))]
