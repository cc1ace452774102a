"""Estimate of whether loading KV blocks from Redis is faster than computing them again."""

from __future__ import annotations

from dataclasses import dataclass

from shared import cost
from shared.messages import CostModel

SMOOTHING = 0.3
FIRST_MS_PER_MB = 4.0
"""Time to load a megabyte before any load was measured: about 250 MB/s, for Redis and Python."""


@dataclass
class TransferCost:
    """Compares the time of loading KV with that of computing it, from measurements of both."""

    model: CostModel = cost.FALLBACK
    """Cost model of this verifier."""
    ms_per_mb: float = FIRST_MS_PER_MB
    """Time to load a megabyte: a moving average."""

    def loading_pays(self, held: int, tokens: int, size_bytes: int) -> bool:
        """Return whether a session with `held` cached tokens gets its next `tokens` faster by loading `size_bytes`."""
        return self.load_ms(size_bytes) < self.prefill_ms(held, tokens)

    def load_ms(self, size_bytes: int) -> float:
        """Return the predicted time of loading this many bytes."""
        return self.ms_per_mb * size_bytes / 1e6

    def prefill_ms(self, held: int, tokens: int) -> float:
        """Return the predicted time that computing this many tokens adds to the batch, which runs in any case."""
        shape = cost.shape_of([(tokens, held + tokens, 0)])
        return cost.predict_ms(self.model, shape) - cost.fixed_ms(self.model)

    def record_load(self, size_bytes: int, took_ms: float) -> None:
        """Learn from a measured load."""
        self.ms_per_mb += SMOOTHING * (took_ms * 1e6 / size_bytes - self.ms_per_mb)
