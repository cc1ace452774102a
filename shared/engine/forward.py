"""The forward pass of a model over packed sessions: one contract, computed by compiled code or by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from shared.errors import EngineError, ModelError
from shared.kernels.cache import PackedBatch

DEFAULT_BLOCKS = 160
"""Capacity of the KV cache where no number is given, but on GPUs with kernels."""


@dataclass(frozen=True, slots=True)
class PassOptions:
    """Options of loading a model."""

    dtype: str
    """Format of the weights (`folder.DTYPES`)."""
    torch_device: torch.device
    threads: int
    blocks: int | None
    """Capacity of the KV cache; None for what the GPU's memory leaves, and `DEFAULT_BLOCKS` elsewhere."""
    keep_hidden: bool = False
    gpu_memory: float = 1.0
    """Share of a GPU's memory that may be taken."""
    gpus: int = 1
    """GPUs that compute the model together, from `torch_device` on."""


class ForwardPass(Protocol):
    """A loaded model with its KV cache."""

    blocks: int
    """Capacity of the KV cache."""
    vocab_size: int
    hidden_size: int
    max_len: int
    """Most tokens of a session."""
    arithmetic: str
    """Identity of the arithmetic. Two machines with the same one give the same bits for the same weights."""
    batch_invariant: bool
    """True if the bits of a session's logits do not depend on the other sessions of a pass."""

    def views(self, block: int) -> Sequence[torch.Tensor]:
        """Return views of a block's keys and values in all layers, for reading or writing whole blocks.

        With several GPUs they are those of the first one's heads.
        """

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""

    def clear_block(self, block: int) -> None:
        """Set a block's keys and values to zero."""

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a packed batch and keep its KV. Returns logits (wanted, vocabulary), which the caller owns, and final
        hidden states (tokens, hidden size), which the next call may overwrite."""


def usable(device: str) -> torch.device:
    """Return the torch device of that name. Raises EngineError when torch cannot compute on it."""
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"device {device!r} cannot be used here ({reason}); WISP_DEVICE=cpu works everywhere"
        ) from error


def require_model_folder(folder: Path) -> None:
    """Raise ModelError for a folder without a configuration."""
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder (it has no config.json); `wisp models prepare` makes one")
