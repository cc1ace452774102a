"""Contracts of a decoder: graphs of its steps, and the other GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from shared.kernels.cache import PackedBatch

Announce = Callable[[PackedBatch, Sequence[int], Sequence[int]], None]
"""Gets a batch, its tokens and its wanted rows."""


class Graphs(Protocol):
    """Steps whose launches are one (`graphs.StepGraphs`)."""

    def logits(self, rows: int, runs: int) -> torch.Tensor | None:
        """Compute the batch in the buffers; return the logits of its wanted rows, or None for too large a batch."""


class Peers(Protocol):
    """The GPUs that compute a model together, each its part (`parts`)."""

    @property
    def ranks(self) -> int:
        """Number of GPUs."""

    def add(self, part: torch.Tensor) -> None:
        """Replace this GPU's part of sums by the sums: the parts of all, added in the order of ranks."""

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """Return the columns of all GPUs beside each other, in the order of ranks."""
