"""Answers of models in the benchmark's own process, without the suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Generated:
    """One answer. Seconds count from the call; the prompt is tokenized before."""

    tokens: list[int]
    first_s: float
    first_tokens: int
    """Tokens that arrived together with the first one."""
    total_s: float


class InProcessModel(Protocol):
    """A model that generates in one or several ways. Takes one call at a time."""

    @property
    def arms(self) -> Sequence[str]:
        """Names of its ways to generate."""

    @property
    def same_text(self) -> bool:
        """True if its answers must be the suite's at every temperature."""

    def generate(self, arm: str, prompt: Sequence[int], count: int, temperature: float, seed: int) -> Generated:
        """Generate exactly `count` tokens, greedily at temperature 0, otherwise sampled without top-k and top-p."""
