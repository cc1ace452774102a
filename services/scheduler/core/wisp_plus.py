"""The batch policy `wisp+`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from heapq import heappop, heappush
from itertools import takewhile
from typing import get_args

from services.scheduler.core.batching import BatchBuilder, BatchPlan, ChosenRound
from services.scheduler.core.policy import (
    MOST_MISSED,
    BatchPolicy,
    PolicyPart,
    Situation,
    slo_reason,
    urgent_rounds,
)
from services.scheduler.core.prompts import PromptPace, prompt_pace, urgent_prompts
from services.scheduler.core.round_queue import Kind, QueuedRound, RoundQueue
from shared import cost

AHEAD_STEPS = 3.0
"""A session that is this many steps ahead of its promise needs no draft token: its next round is in time without."""
CALM_SHARE = 0.5
"""Share of the other rounds' slack that a prompt may use unless it is urgent itself."""


class WispPlus(BatchPolicy):
    """WISP with the token as the unit (ours).

    1. Urgent rounds, by deadline, each with its one certain token.
    2. The other rounds' certain tokens and all rounds' draft tokens, by expected tokens per time. A draft token is
       added only if it raises the batch's expected tokens per time (`trimming`). If an urgent round is late, rounds
       that can wait do so, because each would make the batch longer.
    3. Prompts in the time that is left, in chunks: urgent ones up to the other rounds' slack, the rest up to a share
       of it (`chunking`). What runs can make up for is used in full: a prompt takes less of their time in one large
       chunk than in several. Without chunking, prompts compete like rounds, and one that does not fit takes all the
       time that is left.

    Where loading the weights hides the arithmetic of a step's first tokens, `_fill_hidden` orders these parts anew.

    Sessions whose drafts do not pay are decoded in runs (`runs`): each is a row of every step, and draft tokens compete
    with these rows' certain tokens. In steps without a batch the verifier drafts for them by prompt lookup (`copies`).
    No step takes longer than a run can make up for (`VerifierState.runs_due_ms`), unless prompts need the
    time to come in time themselves.

    Prompts are taken by deadline. A prompt is urgent if, behind those with earlier deadlines, it cannot wait for the
    batch after this one. The next block of the first urgent one has its time and memory reserved before anything is
    added, so that rounds keep no prompt waiting, except that of two which do not fit together the one with the earlier
    deadline goes first (`_reserve_block`). Rounds that are on time with this block in the batch stay on time.
    """

    name = "wisp+"
    parts = frozenset(get_args(PolicyPart))

    def plan(self, queue: RoundQueue, now: Situation) -> BatchPlan:
        batch = BatchBuilder(now.verifier, now.limits, now.start_ms)
        if batch.hidden_tokens and self.plays("chunking"):
            self._fill_hidden(batch, queue, now)
        else:
            urgent = urgent_prompts(now.verifier, queue, now.start_ms, now.horizon_ms)
            if urgent.rounds:
                self._reserve_block(batch, urgent.rounds[0], queue, now)
            self._take_rounds(TokenFill(batch, now, self._certain), queue, now, urgent.needed_ms)
            self._take_prompts(batch, queue, now, {queued.session_id for queued in urgent.rounds})
        for chosen in batch.chosen:
            drafted = chosen.pending.draft_length
            if chosen.prefill_to is None and chosen.draft < drafted:
                chosen.reason += f"; {chosen.draft} of {drafted} draft tokens"
        if not batch.chosen:
            # Not even a block of a prompt fits. The most pressing round is sent all the same, or it would wait for
            # ever: not the one that should have begun first, which is the longest prompt.
            first = next(queue.by("deadline"))
            if not batch.take_chunk(first, slo_reason(first, now), forced=True):
                batch.take_round(first, self._certain(first), slo_reason(first, now), forced=True)
        return batch.plan(len(queue), queue.by("latest start"))

    def _fill_hidden(self, batch: BatchBuilder, queue: RoundQueue, now: Situation) -> None:
        """Fill a batch of which the weights' loading hides some arithmetic.

        Rounds come first, with the draft tokens that they need to keep their promise, then prompts, then the other
        draft tokens.
        """
        pace = prompt_pace(batch, queue, now.limits, now.promised_ms)
        self._reserve(batch, pace)
        ahead_ms = now.start_ms + AHEAD_STEPS * batch.hidden_ms

        def ahead(chosen: ChosenRound) -> bool:
            due_ms, tpot_ms = chosen.pending.due_ms, chosen.pending.verify.tpot_ms
            return due_ms is None or tpot_ms is None or chosen.value >= 1.0 + (ahead_ms - due_ms) / tpot_ms

        if pace.rounds:
            batch.token_price_ms = cost.token_ms(now.verifier.model)
        fill_up = TokenFill(batch, now, self._certain, ahead if pace.rounds else None)
        self._take_rounds(fill_up, queue, now, 0.0)
        most = max(batch.hidden_tokens - batch.tokens + batch.reserved_tokens, pace.tokens)
        starved = pace.starved_tokens(most, batch.hidden_tokens)
        for number, queued in enumerate(pace.rounds):
            room = min(most, starved) if number < pace.starved else most
            if most < 1:
                break
            if room < 1:
                continue
            before, reason = batch.tokens - batch.reserved_tokens, slo_reason(queued, now)
            fits = queued.base + self._certain(queued) <= room
            if not (fits and batch.take_round(queued, self._certain(queued), reason)) and not batch.take_tokens(
                queued, reason, room
            ):
                break
            taken = batch.tokens - batch.reserved_tokens - before
            most -= taken
            starved -= taken if number < pace.starved else 0
        batch.release_reserved()
        if most > 0:
            fill_up.take_spare()

    def _reserve(self, batch: BatchBuilder, pace: PromptPace) -> None:
        """Reserve room for the pace of prompts: for the first starved one its part, for the first other one the rest.

        The starved one may need but a few tokens more, and the room would be lost to the others.
        """
        left, starved = pace.tokens, pace.starved_tokens(pace.tokens, batch.hidden_tokens)
        if left and pace.starved and starved:
            left -= batch.reserve(pace.rounds[0], starved)
        if left > 0 and len(pace.rounds) > pace.starved:
            batch.reserve(pace.rounds[pace.starved], left)

    def _reserve_block(self, batch: BatchBuilder, prompt: QueuedRound, queue: RoundQueue, now: Situation) -> None:
        """Reserve room for the next block of a prompt, unless a round with an earlier deadline has none beside it.

        Where a token takes long, a block fills the longest step. The last part of a prompt, which is a round, takes
        nearly as long, and would else wait until all prompts that arrive are computed.
        """
        first = next(urgent_rounds(queue, now, "rounds"), None)
        if (
            first is None
            or first.deadline_ms > prompt.deadline_ms
            or batch.has_time_beside(prompt, first, self._certain(first))
        ):
            batch.reserve_block(prompt)

    def _certain(self, queued: QueuedRound) -> int:
        """Return the draft tokens that are added together with a round."""
        return 0 if self.plays("trimming") else queued.pending.draft_length

    def _take_rounds(self, fill_up: TokenFill, queue: RoundQueue, now: Situation, prompts_ms: float) -> None:
        """Add rounds and draft tokens. prompts_ms: time that prompts need of this step."""
        kind: Kind = "rounds" if self.plays("chunking") else "all"
        batch = fill_up.batch
        urgent = urgent_rounds(queue, now, kind)
        if (first := next(urgent, None)) is not None:
            fill_up.take_round(first, overtime=not batch.reserved_tokens)
        # Only now, or runs that are due with every step would keep the first urgent round waiting for ever.
        batch.keep_on_time(now.runs_due_ms, prompts_ms)
        for queued in urgent:
            fill_up.take_round(queued)
            if fill_up.missed == MOST_MISSED:
                break
        rest = queue.by("density" if self.plays("density") else "arrival", kind)
        others: Iterator[QueuedRound] = (q for q in rest if q.latest_ms >= now.horizon_ms)
        if batch.has_late:
            # There may be thousands of others: they are not looked at once the hidden tokens are taken.
            others = takewhile(lambda _: batch.tokens < batch.hidden_tokens, others)
            others = (q for q in others if batch.tokens + q.base <= batch.hidden_tokens)
        fill_up.take_by_density(others)

    def _take_prompts(
        self, batch: BatchBuilder, queue: RoundQueue, now: Situation, urgent_ids: Collection[str]
    ) -> None:
        calm_ms = batch.limit_ms
        if self.plays("chunking"):
            if batch.rounds_limit_ms < now.limits.max_batch_ms:
                calm_ms = min(calm_ms, CALM_SHARE * batch.rounds_limit_ms)
            if now.expected_due_ms is not None:
                calm_ms = min(calm_ms, CALM_SHARE * max(0.0, batch.slack_ms(now.expected_due_ms)))
        for queued in queue.by("deadline", "prompts"):
            if queued in batch:
                continue
            urgent = queued.session_id in urgent_ids
            limit_ms = batch.limit_ms if urgent else calm_ms
            reason = slo_reason(queued, now)
            if not (
                batch.take_round(queued, self._certain(queued), reason, limit_ms=limit_ms)
                or batch.take_chunk(queued, reason, limit_ms=limit_ms)
            ) and not (urgent and batch.tries_prompts()):
                break
        batch.release_reserved()


class TokenFill:
    """Fills a batch with rounds and single draft tokens, which compete by expected tokens per time."""

    def __init__(
        self,
        batch: BatchBuilder,
        now: Situation,
        certain: Callable[[QueuedRound], int],
        spare: Callable[[ChosenRound], bool] | None = None,
    ) -> None:
        """certain: returns the draft tokens that are added together with a round. spare: returns whether to leave the
        rest of a round's draft for `take_spare`."""
        self.batch = batch
        self._now = now
        self._certain = certain
        self._spare = spare
        self._spared: list[ChosenRound] = []
        self._value = float(len(now.verifier.runs))
        """Tokens that the step is expected to bring: one of each run, and those of the batch."""
        self._drafts: list[tuple[float, str, ChosenRound]] = []
        """Heap of the rounds with draft tokens left, the likeliest next token first."""
        self.missed = 0
        """Rounds that did not fit."""

    def take_round(self, queued: QueuedRound, *, overtime: bool = False) -> None:
        """Add a round if it fits. overtime: its time need not fit."""
        reason = slo_reason(queued, self._now)
        if self.batch.take_round(queued, self._certain(queued), reason, overtime=overtime):
            chosen = self.batch.chosen[-1]
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

    def take_spare(self) -> None:
        """Add the draft tokens that were left for later."""
        spared, self._spare, self._spared = self._spared, None, []
        for chosen in spared:
            self._offer(chosen)
        self.take_by_density(iter(()))

    def _offer(self, chosen: ChosenRound) -> None:
        if self._spare is not None and self._spare(chosen):
            self._spared.append(chosen)
            return
        survival = chosen.pending.survival
        if chosen.draft < len(survival):
            heappush(self._drafts, (-survival[chosen.draft], chosen.session_id, chosen))

    def _take_token(self) -> None:
        _, _, chosen = heappop(self._drafts)
        worth = chosen.pending.survival[chosen.draft]
        if self.batch.take_token(chosen, self._value, self._now.verifier.gap_ms):
            self._value += worth
            self._offer(chosen)
        else:
            self._drafts.clear()  # the others bring less and cost no less
