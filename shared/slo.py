"""SLOs: deadlines of tokens, the time between batches that meets them, and whether an answer attained its SLO.

The first token is due `ttft_ms` after the request's start, and each later one `tpot_ms` after the one before, counted
from the first token's arrival. A request attains its SLO by its time to first token and by its mean time per token
after it, so an early first token does not make up for slow later ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, model_validator

from shared.messages import Promised, Slo

BATCHES_PER_ROUND = 1.5
"""Batches per round: on average half of the batch that runs when the round arrives, and its own."""
HOPELESS_GAIN = 1.3
"""Factor by which a run has to be faster than rounds if its steps take longer than the promised time per token. Such a
run always misses the promise. Rounds are slower on average, and yet keep the promise of many sessions."""


class Promise(BaseModel):
    """An optional SLO in settings and files: both of its times, or neither."""

    ttft_ms: Promised | None = None
    tpot_ms: Promised | None = None

    @model_validator(mode="after")
    def _whole(self) -> Promise:
        if (self.ttft_ms is None) != (self.tpot_ms is None):
            raise ValueError("an SLO has both ttft_ms and tpot_ms; best effort has neither")
        return self

    @property
    def slo(self) -> Slo | None:
        """The SLO, or None."""
        if self.ttft_ms is None or self.tpot_ms is None:
            return None
        return Slo(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms)


def due_after_ms(slo: Slo, output_tokens: int, first_ms: float | None) -> float:
    """Return the milliseconds from the request's start until its next token is due.

    `output_tokens` are committed, the first of them after `first_ms`.
    """
    if not output_tokens or first_ms is None:
        first_ms = slo.ttft_ms
    return first_ms + slo.tpot_ms * output_tokens


def slack_ms(slo: Slo | None, elapsed_ms: float, output_tokens: int, first_ms: float | None) -> float | None:
    """Return the milliseconds left until the next token is due (negative when late); None without an SLO."""
    return None if slo is None else due_after_ms(slo, output_tokens, first_ms) - elapsed_ms


def batch_period_ms(round_period_ms: float, away_ms: float, alone_ms: float) -> float:
    """Return the longest time between batches for a session that needs a round every `round_period_ms`.

    away_ms: part of that time between a result and the next round's arrival. alone_ms: time of a batch of this round
    alone; an SLO that leaves less time can only be met for a lone session.
    """
    return max(round_period_ms - away_ms, alone_ms) / BATCHES_PER_ROUND


class StepNeed(NamedTuple):
    """Need of a session with an SLO for its verifier's steps."""

    share: float
    """Time that it adds to them, as a share of all time."""
    period_ms: float
    """Longest time between two steps."""


def step_need(
    tpot_ms: float, *, fixed_ms: float, round_ms: float, tokens_per_round: float, away_ms: float, run_ms: float | None
) -> StepNeed | None:
    """Return a session's need; None where a verifier could not keep the promise even for this session alone.

    A run that keeps the promise needs a token in a step every `tpot_ms`, as in centralized serving: it is never away,
    and waits for no step but its own. Otherwise the session needs rounds.

    fixed_ms: time of a step apart from its sessions' own. round_ms, run_ms: time that a round, and a token of a run,
    adds to a step; run_ms is None without runs. tokens_per_round: what a round brings. away_ms: time between rounds.
    """
    if run_ms is not None and tpot_ms >= fixed_ms + run_ms:
        return StepNeed(run_ms / tpot_ms, tpot_ms)
    every_ms, alone_ms = tpot_ms * tokens_per_round, fixed_ms + round_ms
    if every_ms < alone_ms:
        return None
    return StepNeed(round_ms / every_ms, batch_period_ms(every_ms, away_ms, alone_ms))


def least_tpot_ms(*, fixed_ms: float, round_ms: float, tokens_per_round: float, run_ms: float | None) -> float:
    """Return the shortest time per token for which `step_need` returns a need. It defines the arguments."""
    rounds_ms = (fixed_ms + round_ms) / tokens_per_round
    return rounds_ms if run_ms is None else min(rounds_ms, fixed_ms + run_ms)


@dataclass(frozen=True)
class SloOutcome:
    """Speed of a completion, and whether it attained its SLO."""

    ttft_ms: float | None
    """Time to the first token; to the end, for a complete completion without tokens."""
    tpot_ms: float | None
    """Mean time per output token after the first; None with fewer than two tokens."""
    attained: bool
    """True if the completion is complete and within its SLO; true for every complete one without an SLO."""


def judge(slo: Slo | None, complete: bool, tokens: int, first_ms: float | None, total_ms: float) -> SloOutcome:
    """Compare a completion of `tokens` tokens with its SLO; times count from the request's arrival.

    `complete` means that it ended with an end-of-text token, a stop string or its token limit.
    """
    ttft_ms = total_ms if complete and first_ms is None else first_ms
    tpot_ms = None if first_ms is None or tokens < 2 else (total_ms - first_ms) / (tokens - 1)
    return SloOutcome(ttft_ms, tpot_ms, complete and is_within(slo, ttft_ms, tpot_ms))


def is_within(slo: Slo | None, ttft_ms: float | None, tpot_ms: float | None) -> bool:
    """Return whether times are within an SLO; all are without one. `tpot_ms` is None with fewer than two tokens."""
    if slo is None:
        return True
    return ttft_ms is not None and ttft_ms <= slo.ttft_ms and (tpot_ms is None or tpot_ms <= slo.tpot_ms)
