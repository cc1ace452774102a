"""Whether a session's K/V are sooner loaded or computed again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shared import cost
from shared.engine.blocks import BLOCK
from shared.messages import CostModel

SMOOTHING = 0.3
UNKNOWN_MS_PER_MB = 4.0
"""Loading before any was measured: Redis and Python at some 250 MB/s."""


@dataclass
class Worth:
    """Weighs loading blocks against computing them, by what each took before."""

    model: CostModel = cost.FALLBACK
    """Predicts this verifier's times."""
    ms_per_mb: float = UNKNOWN_MS_PER_MB

    def loads(self, held: int, blocks: int, block_bytes: int) -> bool:
        """Whether a session with `held` cached tokens gets its next `blocks` blocks sooner by loading them."""
        return self.load_ms(blocks * block_bytes) < self.prefill_ms(held, blocks * BLOCK)

    def load_ms(self, size: int) -> float:
        """Predicted time to load so many bytes."""
        return self.ms_per_mb * size / 1e6

    def prefill_ms(self, held: int, tokens: int) -> float:
        """Predicted time that computing so many tokens adds to the batch that needs them anyway."""
        shape = cost.shape_of([(tokens, held + tokens, 0)])
        return cost.predict_ms(self.model, shape) - cost.fixed_ms(self.model)

    def loaded(self, size: int, took_ms: float) -> None:
        """So many bytes took so long."""
        self.ms_per_mb += SMOOTHING * (took_ms * 1e6 / size - self.ms_per_mb)
