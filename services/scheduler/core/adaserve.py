"""The batch policy `adaserve`: AdaServe's selection of draft tokens, over chains instead of trees."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from services.scheduler.core.batching import BatchBuilder, BatchPlan, ChosenRound
from services.scheduler.core.policy import MOST_MISSED, BatchPolicy, Situation, slo_reason
from services.scheduler.core.round_queue import QueuedRound, RoundQueue
from shared import cost

PROMPT_TOKENS = 128
"""Tokens of prompts in a step: ours, since the paper names none."""
BUDGET_GROWTH = 0.5
"""Without hidden tokens, a step may take longer than one that only loads the weights by this share."""


class AdaServe(BatchPolicy):
    """AdaServe (arXiv 2501.12162): tokens for those that need them, then for the likeliest, within a budget of tokens.

    Every round gets its certain token. In descending order of the tokens that sessions need in this step to keep their
    promise, each gets draft tokens until that many are expected. The rest of the budget goes to the likeliest draft
    tokens of all. Prompts get up to `PROMPT_TOKENS` beside them, by deadline.
    """

    name = "adaserve"

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        batch = BatchBuilder(now.verifier, now.limits, now.start_ms)
        first = next(queue.by("deadline"))
        if first.is_prompt:
            batch.reserve_block(first)
        missed = 0
        for queued in queue.by("deadline", "rounds"):
            missed += not batch.take_round(queued, 0, slo_reason(queued, now))
            batch.limit_ms = now.limits.max_batch_ms
            if missed == MOST_MISSED:
                break
        rounds = [chosen for chosen in batch.chosen if chosen.pending.draft_length]
        budget = batch.hidden_tokens or _budget(batch, now)
        self._take_needed(batch, rounds, budget)
        self._take_prompts(batch, queue, now)
        self._take_likeliest(batch, rounds, budget)
        if not batch.chosen and not batch.take_chunk(first, slo_reason(first, now), forced=True):
            batch.take_round(first, 0, slo_reason(first, now), forced=True)
        return batch.plan(len(queue), queue.by("deadline"))

    @staticmethod
    def _take_needed(batch: BatchBuilder, rounds: list[ChosenRound], budget: int) -> None:
        """Add the draft tokens that sessions need to keep their promise."""
        end_ms = batch.start_ms + batch.predicted_ms
        needs = sorted(((_needed(chosen, end_ms), chosen.session_id, chosen) for chosen in rounds), reverse=True)
        for needed, _, chosen in needs:
            while chosen.value < needed and chosen.draft < chosen.pending.draft_length and batch.tokens < budget:
                if not batch.take_token(chosen, 0.0, 0.0):
                    return

    def _take_prompts(self, batch: BatchBuilder, queue: RoundQueue, now: Situation) -> None:
        left = PROMPT_TOKENS
        for queued in queue.by("deadline", "prompts"):
            before, reason = batch.tokens - batch.reserved_tokens, slo_reason(queued, now)
            whole = queued.base <= left and batch.take_round(queued, 0, reason)
            batch.limit_ms = now.limits.max_batch_ms
            if not whole and not self._take_part(batch, queued, reason, left):
                break
            left -= batch.tokens - batch.reserved_tokens - before
            if left < 1:
                break
        batch.release_reserved()

    @staticmethod
    def _take_part(batch: BatchBuilder, queued: QueuedRound, reason: str, most: int) -> bool:
        """Add a part of a prompt: whole blocks where tokens are not hidden."""
        if batch.hidden_tokens:
            return batch.take_tokens(queued, reason, most)
        return batch.take_chunk(queued, reason, limit_ms=batch.predicted_ms + most * cost.token_ms(batch.model))

    @staticmethod
    def _take_likeliest(batch: BatchBuilder, rounds: list[ChosenRound], budget: int) -> None:
        """Add the likeliest draft tokens up to the budget, to which prompts do not count."""
        prompts = sum(one.prefill_to - one.queued.held for one in batch.chosen if one.prefill_to is not None)
        heap = [_offer(chosen) for chosen in rounds if chosen.draft < chosen.pending.draft_length]
        heapify(heap)
        while heap and batch.tokens - prompts < budget:
            _, _, chosen = heappop(heap)
            if not batch.take_token(chosen, 0.0, 0.0):
                return
            if chosen.draft < chosen.pending.draft_length:
                heappush(heap, _offer(chosen))


def _offer(chosen: ChosenRound) -> tuple[float, str, ChosenRound]:
    return -chosen.pending.survival[chosen.draft], chosen.session_id, chosen


def _needed(chosen: ChosenRound, end_ms: float) -> float:
    """Return the tokens that a session needs by the end of a step."""
    due_ms, tpot_ms = chosen.pending.due_ms, chosen.pending.verify.tpot_ms
    return 0.0 if due_ms is None or tpot_ms is None else 1.0 + (end_ms - due_ms) / tpot_ms


def _budget(batch: BatchBuilder, now: Situation) -> int:
    model = now.verifier.model
    return batch.tokens + int(BUDGET_GROWTH * cost.fixed_ms(model) / max(1e-6, cost.token_ms(model)))
