"""What a draft source knows of a token that it drafted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guess:
    """One drafted token, as its source sees it. A token copied from earlier text has `support` and no confidence."""

    source: str
    confidence: float = 0.0
    """Probability of the token in the draft's own distribution at temperature 1."""
    entropy: float = 0.0
    """Entropy of that distribution, in nats."""
    margin: float = 0.0
    """Probability of its likeliest token minus that of the second."""
    spread: float = 0.0
    """Standard deviation of the logits over the vocabulary."""
    support: int = 0
    """Length in tokens of the n-gram whose continuation was copied; 0 for tokens of a model."""
    agreed: bool = False
    """Another source proposes the same token here; or did where the copying began that this token goes on with."""
    contested: bool = False
    """Another source proposes another token here."""
