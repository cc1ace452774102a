"""The demand on verifiers: the measure by which their number is scaled.

A step takes a fixed time, whatever is in it, and more verifiers do not shorten it. What more verifiers bring is room in
their steps. So the demand on a verifier is the share of this room that its sessions and prompts need:

    (tokens per time that are needed) x (longest step that keeps the promises) / (tokens that fit such a step)

It grows in proportion to sessions and prompts and falls in proportion to verifiers, on a CPU, where each token takes
its time, as on an accelerator, where loading the weights hides the arithmetic of a step's first tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import NamedTuple

from services.scheduler.core.batching import hidden_tokens
from shared import cost
from shared.cost.model import MILLION, TYPICAL_LENGTH
from shared.messages import CostModel
from shared.slo import batch_period_ms


class SessionNeed(NamedTuple):
    """The tokens that a session with an SLO needs of its verifier."""

    tokens_per_ms: float
    """Tokens to compute per millisecond."""
    step_ms: float
    """Longest step that keeps its promise."""


def alone_ms(model: CostModel) -> float:
    """Return the time of a step of one token."""
    return cost.predict_ms(model, cost.shape_of([(1, TYPICAL_LENGTH, 1)]))


def session_need(
    model: CostModel, tpot_ms: float, *, runs: bool, round_tokens: float, tokens_per_round: float, away_ms: float
) -> SessionNeed | None:
    """Return a session's need; None where the verifier could not keep the promise even for this session alone.

    Where `runs` are allowed and a run keeps the promise, it is one token per step. Otherwise it is rounds:
    round_tokens: tokens computed for one. tokens_per_round: those that it brings. away_ms: time between them.
    """
    least_ms = alone_ms(model)
    if runs and tpot_ms >= least_ms:
        return SessionNeed(1.0 / tpot_ms, tpot_ms)
    round_ms = tpot_ms * tokens_per_round
    if round_ms < least_ms:
        return None
    return SessionNeed(round_tokens / round_ms, max(least_ms, batch_period_ms(round_ms, away_ms, least_ms)))


def demand(model: CostModel, needs: Iterable[SessionNeed], prompt_share: float) -> float:
    """Return the demand on a verifier; 1 is all that it can compute in time.

    prompt_share: predicted time of the prompts that arrive in some time, as a share of it.
    """
    needs = list(needs)
    rate = prompt_share / _row_ms(model, hidden=False) + sum(need.tokens_per_ms for need in needs)
    return rate / room_tokens_per_ms(model, needs)


def room_tokens_per_ms(model: CostModel, needs: Iterable[SessionNeed]) -> float:
    """Return the most tokens per millisecond in steps that keep these promises, each of a session of typical length."""
    step_ms = min((need.step_ms for need in needs), default=inf)
    later_ms = _row_ms(model, hidden=False)
    if step_ms == inf:
        return 1.0 / later_ms
    first_ms = _row_ms(model, hidden=True)
    # A step may always fill the tokens whose arithmetic is hidden behind loading the weights.
    step_ms = max(step_ms, cost.fixed_ms(model) + first_ms * hidden_tokens(model))
    room_ms = step_ms - cost.fixed_ms(model)
    if room_ms <= model.knee * first_ms:
        tokens = room_ms / first_ms
    else:
        tokens = model.knee + (room_ms - model.knee * first_ms) / later_ms
    return max(1.0, tokens) / step_ms


def _row_ms(model: CostModel, *, hidden: bool) -> float:
    """Return what one more token of another session adds to a step, below the model's knee if `hidden`."""
    _, job, _, _, held, _, _ = model.coefficients
    in_step = 0.0 if hidden else model.knee
    return max(1e-6, job + cost.token_ms(model, in_step) + held * TYPICAL_LENGTH / MILLION)
