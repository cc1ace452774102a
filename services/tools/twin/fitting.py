"""Traces for other pairs of models: changes the acceptance of a recorded trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.drafter.control import ControlWeights
from services.drafter.control.features import RoundContext, features
from services.drafter.sources.twin import token_of
from services.tools.training.classifiers import auc
from shared.errors import SettingsError
from shared.twin.trace import COPIED, DEPTH, PRESENT, DraftChain, Trace

LEAST, MOST = 0.5, 0.9
"""Range of first-token acceptances."""


def fitted(trace: Trace, acceptance: float, seed: int = 0) -> Trace:
    """Return a trace in which this share of the draft model's first tokens is accepted.

    To thin, correct tokens become wrong, each with the same chance; to enrich, wrong ones become correct. A changed
    token takes the statistics of a recorded token of its new kind at the same depth. So the statistics of correct and
    of wrong tokens stay distributed as they were, and predictors tell them apart as well. Copies stay as they are.
    Raises SettingsError for an acceptance out of range, and for a trace that cannot be fitted.
    """
    if not LEAST <= acceptance <= MOST:
        raise SettingsError(f"an acceptance of {acceptance:g} is not between {LEAST:g} and {MOST:g}")
    rng = np.random.default_rng(seed)
    now = trace.first_acceptance("hidden")
    if not 0 < now < 1:
        raise SettingsError(
            "the trace cannot be fitted: of its first draft tokens, none or all are accepted; record another one with "
            "`wisp trace record`"
        )
    thin = acceptance < now
    chance = 1 - acceptance / now if thin else (acceptance - now) / (1 - now)
    chains = {
        name: chain if name == "lookup" else _changed(trace, name, chance, rng, thin=thin)
        for name, chain in trace.chains.items()
    }
    facts = {**trace.facts, "fitted_to": acceptance, "recorded_acceptance": round(now, 4)}
    return replace(trace, chains=chains, facts=facts)


def _changed(trace: Trace, name: str, chance: float, rng: np.random.Generator, *, thin: bool) -> DraftChain:
    chain, right = trace.chains[name], trace.correct(name)
    by_model = (chain.flags & PRESENT > 0) & (chain.flags & COPIED == 0)
    at = np.arange(len(right))[:, None] + np.arange(DEPTH)
    inside = at < trace.ends[:, None]
    answer = trace.tokens[np.minimum(at, len(trace.tokens) - 1)]
    flips = by_model & inside & (right == thin) & (rng.random(right.shape) < chance)
    tokens, statistics = chain.tokens.copy(), chain.statistics.copy()
    # A wrong token is the one after it in the text, or the one before: never the answer's.
    after = trace.tokens[np.minimum(at + 1, len(trace.tokens) - 1)]
    wrong = np.where(after != answer, after, answer ^ 1)
    tokens[flips] = (wrong if thin else answer)[flips]
    judged = trace.judged(name)
    for depth in range(DEPTH):
        donors = np.flatnonzero(judged[:, depth] & by_model[:, depth] & (right[:, depth] != thin))
        receivers = np.flatnonzero(flips[:, depth])
        if len(donors) and len(receivers):
            statistics[receivers, depth] = chain.statistics[rng.choice(donors, len(receivers)), depth]
    return replace(chain, tokens=tokens, statistics=statistics)


def ranking(trace: Trace, name: str, weights: ControlWeights) -> float:
    """Return the AUC of the controller's estimates for the draft model's tokens of a chain."""
    model = weights.acceptance.get("hidden")
    if model is None:
        raise SettingsError("the draft has no trained controller; give its weights")
    chain, right = trace.chains[name], trace.correct(name)
    rows, depths = np.nonzero(trace.judged(name) & (chain.flags & COPIED == 0))
    temperatures = np.repeat(trace.temperature, np.diff(trace.starts))
    estimates: NDArray[np.float64] = np.array(
        [
            model.logit(
                features(
                    token_of("hidden", chain, int(row), int(depth)),
                    int(depth),
                    RoundContext(float(temperatures[row]), None, 0.5),
                )
            )
            for row, depth in zip(rows, depths, strict=True)
        ]
    )
    return auc(right[rows, depths], estimates)
