"""Blocks of compiled code's KV cache as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kernels.cache import BlockMemory


def block_views(memory: BlockMemory, block: int) -> Sequence[torch.Tensor]:
    """Return views of a block's keys and values in all layers, as bytes."""
    return [torch.from_numpy(part[:, block]) for part in (memory.keys, memory.values)]
