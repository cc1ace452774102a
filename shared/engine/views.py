"""Blocks of a KV cache as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kernels.cache import BlockMemory


def block_views(memory: BlockMemory, block: int) -> Sequence[torch.Tensor]:
    """Return views of a block's keys and values in all layers of compiled code's cache, as bytes."""
    return [torch.from_numpy(part[:, block]) for part in (memory.keys, memory.values)]


class ViewedBlocks:
    """Whole blocks, copied and cleared through their views."""

    def views(self, block: int) -> Sequence[torch.Tensor]:
        """Return views of a block's keys and values in all layers."""
        raise NotImplementedError

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""
        for there, here in zip(self.views(source), self.views(target), strict=True):
            here.copy_(there)

    def clear_block(self, block: int) -> None:
        """Set a block's keys and values to zero."""
        for view in self.views(block):
            view.zero_()
