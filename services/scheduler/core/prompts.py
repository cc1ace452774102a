"""Prompts pending for a step: which of them cannot wait longer, and how many of their tokens the step should compute.

Where every token of a step takes its time (a CPU), a prompt that can wait leaves most of the other rounds' slack to
them, and one that cannot has its next block reserved. Where loading the weights hides the arithmetic of a step's first
tokens (an accelerator), prompts use what rounds and runs leave of these tokens, which costs next to nothing, and have
as many tokens reserved as they need in each step to come in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from math import ceil, inf

from services.scheduler.core.batching import BatchBuilder, BatchLimits
from services.scheduler.core.pool import VerifierState
from services.scheduler.core.round_queue import QueuedRound, RoundQueue, added_ms
from shared import cost
from shared.kernels.layout import BLOCK

MOST_TRIED = 64
"""Prompts that a step considers: there may be thousands."""
PROMISE_SHARE = 0.96
"""Prompts lengthen steps to at most this share of the shortest promised time per token."""
LEAST_ROOM = 0.25
"""Prompts count on at least this share of the hidden tokens, and so do those among them that have waited too long."""
PACE_SHARE = 0.5
"""Prompts are to be computed in this share of the time until they are due: others will arrive meanwhile."""


@dataclass(frozen=True)
class UrgentPrompts:
    """Prompts that cannot wait for the batch after this one."""

    rounds: list[QueuedRound]
    """In order of their deadlines."""
    needed_ms: float
    """Time of a step for prompts with which all of them come in time, beside the runs."""


def urgent_prompts(verifier: VerifierState, queue: RoundQueue, start_ms: float, horizon_ms: float) -> UrgentPrompts:
    """Return the urgent prompts: a prompt starts only when those with earlier deadlines are computed.

    horizon_ms: latest start of an urgent round. Each block of a prompt beside runs takes the time of a step of these
    as well.
    """
    runs_ms = cost.predict_ms(verifier.model, verifier.runs.shape)
    block_ms = added_ms(verifier.model, BLOCK, BLOCK, 0)
    prompts = list(islice(queue.by("deadline", "prompts"), MOST_TRIED))
    work_ms, share, urgent = 0.0, 0.0, 0
    for count, queued in enumerate(prompts, 1):
        work_ms += queued.own_ms
        if queued.deadline_ms - work_ms * (1.0 + runs_ms / block_ms) < horizon_ms:
            urgent = count
        if queued.pending.due_ms is not None:
            left_ms = queued.deadline_ms - start_ms
            share = max(share, work_ms / left_ms if left_ms > work_ms else 1.0)
    needed_ms = runs_ms * share / (1.0 - share) if share < 1.0 else inf
    return UrgentPrompts(prompts[:urgent], needed_ms if urgent else 0.0)


@dataclass(frozen=True)
class PromptPace:
    """Prompts in the order in which a step takes them, and the tokens that it should compute of them."""

    rounds: Sequence[QueuedRound]
    tokens: int
    """Tokens with which all that can come in time do so, within the longest step that sessions were promised."""
    starved: int
    """Prompts at the head of `rounds` that are late and have waited for the longest time."""
    timely_tokens: int
    """Tokens of the prompts behind these that can come in time."""

    def starved_tokens(self, room: int, hidden_tokens: int) -> int:
        """Return how many of a step's `room` tokens the starved prompts get.

        What those that can come in time leave, and at least `LEAST_ROOM` of the hidden tokens.
        """
        return min(room, max(ceil(LEAST_ROOM * hidden_tokens), room - self.timely_tokens))


def prompt_pace(batch: BatchBuilder, queue: RoundQueue, limits: BatchLimits, promised_ms: float) -> PromptPace:
    """Return the pace of prompts in a step whose weights' loading hides arithmetic.

    Where not all can come in time, the longest ones wait behind the others, so that as many as possible do (the rule of
    Moore and Hodgson, Management Science 15(1), 1968), until they are due and have waited for the longest time. From
    then on they have a part of each step: the whole step would make prompts late that can still come in time, and these
    would have to go first in their turn.
    promised_ms: shortest time per token that a session of the verifier was promised.
    """
    hidden_ms = batch.hidden_ms
    starved: list[QueuedRound] = []
    waiting: list[QueuedRound] = []
    for queued in islice(queue.by("deadline", "prompts"), MOST_TRIED):
        waited_ms = batch.start_ms - queued.pending.arrived_ms
        is_starved = waited_ms >= limits.max_wait_ms and batch.start_ms >= _due_ms(queued)
        (starved if is_starved else waiting).append(queued)
    waiting.sort(key=_due_ms)
    others = batch.tokens + queue.short_tokens
    starved_tokens = ceil(LEAST_ROOM * batch.hidden_tokens) if starved else 0
    longest_ms = max(hidden_ms, min(PROMISE_SHARE * promised_ms, limits.max_batch_ms))
    timely, late = _in_time(waiting, starved_tokens, batch, others, hidden_ms)
    in_longer, late_in_longer = _in_time(waiting, starved_tokens, batch, others, longest_ms) if late else (timely, late)
    if len(in_longer) > len(timely):
        timely, late = in_longer, late_in_longer
        tokens = _step_tokens(batch, others, longest_ms)
    else:
        work, rate = 0, 0.0
        for queued in timely:
            work += queued.base
            rate = max(rate, work / max(hidden_ms, PACE_SHARE * (_due_ms(queued) - batch.start_ms)))
        tokens = min(rate * hidden_ms + starved_tokens, _step_tokens(batch, others, longest_ms))
    timely_tokens = sum(queued.base for queued in timely)
    return PromptPace([*starved, *timely, *late], ceil(tokens), len(starved), timely_tokens)


def _due_ms(queued: QueuedRound) -> float:
    """Return when a prompt is due by its SLO, even if that is later than the longest wait. Without one, that wait."""
    due_ms = queued.pending.due_ms
    return queued.deadline_ms if due_ms is None else max(due_ms, queued.deadline_ms)


def _step_tokens(batch: BatchBuilder, others: int, step_ms: float) -> float:
    """Return the tokens that prompts have in a step of this time with `others` more tokens."""
    room = batch.hidden_tokens - others + (step_ms - batch.hidden_ms) / cost.token_ms(batch.model)
    return max(LEAST_ROOM * batch.hidden_tokens, room)


def _in_time(
    prompts: Sequence[QueuedRound], starved_tokens: int, batch: BatchBuilder, others: int, step_ms: float
) -> tuple[list[QueuedRound], list[QueuedRound]]:
    """Divide prompts, given by due time, into the most that come in time in steps of this time, and the rest.

    starved_tokens: tokens of other prompts in each step.
    """
    rate = max(1.0, _step_tokens(batch, others, step_ms) - starved_tokens) / step_ms
    longest: list[tuple[int, str]] = []
    late, work = set(), 0
    for queued in prompts:
        heappush(longest, (-queued.base, queued.session_id))
        work += queued.base
        if work > rate * (_due_ms(queued) - batch.start_ms):
            base, session_id = heappop(longest)
            late.add(session_id)
            work += base
    timely = [queued for queued in prompts if queued.session_id not in late]
    return timely, [queued for queued in prompts if queued.session_id in late]
