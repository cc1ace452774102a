"""The operations that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Operation = Literal["decode", "verify 5", "verify 9", "prefill"]

NEW_TOKENS: dict[Operation, int] = {"decode": 1, "verify 5": 5, "verify 9": 9, "prefill": 512}
"""Number of new tokens of each session, by operation."""


@dataclass(frozen=True)
class EngineCase:
    """One operation on `sessions` sessions at once, each with `cached` cached tokens."""

    operation: Operation
    sessions: int
    cached: int

    @property
    def new(self) -> int:
        """New tokens of each session."""
        return NEW_TOKENS[self.operation]

    @property
    def rows(self) -> int:
        """Positions of each session that need logits: all, but only the last one of a prompt."""
        return 1 if self.operation == "prefill" else self.new

    @property
    def warm_passes(self) -> int:
        """Untimed passes of a visit, which bring weights and threads back after another arm's visit."""
        return 0 if self.operation == "prefill" else 1

    @property
    def timed_passes(self) -> int:
        """Timed passes of a visit: several where a pass is short."""
        return 5 if self.sessions == 1 and self.operation != "prefill" else 1

    def record(self) -> dict[str, Any]:
        """Return the case for a message or a result file."""
        return asdict(self)


def cases(sessions: Sequence[int], cached: int) -> list[EngineCase]:
    """Return all cases: one session decodes, verifies and prefills; more of them decode and verify 5 tokens each."""
    alone: list[Operation] = ["decode", "verify 5", "verify 9"]
    together: list[Operation] = ["decode", "verify 5"]
    return [
        *(EngineCase(operation, 1, cached) for operation in alone),
        EngineCase("prefill", 1, 0),
        *(EngineCase(operation, count, cached) for count in sessions if count > 1 for operation in together),
    ]
