"""How long to wait for a round's result before sending it again. Pure.

The retransmission timer of TCP (RFC 6298, section 2): smoothed round time plus four times its mean deviation, doubled
with every attempt. The first round of a session computes its prompt and is timed apart from the others.
"""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = 1 / 8
BETA = 1 / 4
UNKNOWN_MS = 5000.0
LONGEST_MS = 30_000.0


@dataclass
class RoundTimer:
    """Learns the round time from results."""

    shortest_ms: float
    smoothed_ms: float | None = None
    deviation_ms: float = 0.0

    def learn(self, measured_ms: float) -> None:
        """Take in one round that needed no second attempt."""
        if self.smoothed_ms is None:
            self.smoothed_ms, self.deviation_ms = measured_ms, measured_ms / 2
            return
        self.deviation_ms += BETA * (abs(self.smoothed_ms - measured_ms) - self.deviation_ms)
        self.smoothed_ms += ALPHA * (measured_ms - self.smoothed_ms)

    def timeout_ms(self, attempt: int) -> float:
        """Time to wait for the result of the given attempt, the first being 0."""
        base = UNKNOWN_MS if self.smoothed_ms is None else self.smoothed_ms + 4 * self.deviation_ms
        return float(min(LONGEST_MS, max(self.shortest_ms, base) * 2**attempt))
