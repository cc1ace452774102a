"""Options and reports of learning, which a drafter exchanges with its learning process. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

DraftWeights = dict[str, NDArray[np.uint16]]
"""Trained weights by name, as bits of bfloat16."""


@dataclass(frozen=True)
class LearningOptions:
    """Settings of learning."""

    buffer_tokens: int = 32_768
    """Most tokens in the buffer; the oldest texts leave it first."""
    draft_steps: int = 1
    """Draft steps to learn. Further ones cost more than half of an update each."""
    judged_steps: int = 3
    """Draft steps of a comparison, so that weights that spoil later tokens are not taken."""
    batch_tokens: int = 384
    updates: int = 16
    """Updates between two comparisons."""
    passes: float = 4.0
    """Times that a token is learned, on average."""
    rate: float = 1e-4
    """Learning rate. At 3e-4 candidates became worse than the shipped draft before they could become better."""
    fc_rate: float = 0.3
    """Learning rate of the input projection / that of the others."""
    pull: float = 10.0
    """Strength of the pull back to the shipped weights: each update goes rate x pull of the way."""
    drop_states: float = 0.05
    seed: int = 1
    yields: bool = True
    """Compute only with CPU time that no other process wants."""


class LearningOutcome(StrEnum):
    """The result of a comparison."""

    TAKEN = "taken"
    """The candidate's weights are in use from now on."""
    ROLLED_BACK = "rolled back"
    """Earlier weights are in use again."""
    REJECTED = "rejected"
    """The candidate had become worse, and begins again at the weights in use."""
    UNDECIDED = "undecided"
    """The candidate goes on learning."""


@dataclass(frozen=True)
class LearningReport:
    """A comparison, and the weights to use if they have changed."""

    outcome: LearningOutcome
    version: int
    """Number of changes of the weights in use since the shipped ones."""
    updates: int
    """Updates since the start."""
    learned: int
    """Tokens learned since the start, repetitions included."""
    acceptance: float
    """Share of first draft tokens accepted on the held-back texts, with the weights in use from now on."""
    shipped_acceptance: float
    """The same with the shipped weights."""
    weights: DraftWeights | None = None
    """The weights in use, if they have changed."""
