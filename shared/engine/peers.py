"""GPUs that compute one model together: what they exchange during a pass, by torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gathers tensors of equal shapes. Torch before 2.13 has it by its former name only."""


@dataclass(frozen=True, slots=True)
class GroupMembership:
    """The place of a process among those of all GPUs."""

    rank: int
    ranks: int
    meeting: Path
    """A file through which the processes find each other."""

    def join(self, torch_device: torch.device) -> None:
        """Join the group of all ranks, once all have been started: by NCCL on GPUs, by gloo on the CPU."""
        on_gpus = torch_device.type == "cuda"
        if on_gpus:
            torch.cuda.set_device(torch_device)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would ask for the host's name
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            store=dist.FileStore(str(self.meeting), self.ranks),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.ranks,
            device_id=torch_device if on_gpus else None,
        )


class GroupPeers:
    """Sums and columns of all ranks of the process group.

    Parts are gathered and then added in the order of ranks. The order of a reduction by NCCL depends on the size of the
    tensor, and so on the batch.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def add(self, part: torch.Tensor) -> None:
        """Replace this rank's part of sums, (rows, columns), by the sums of all."""
        first, second, *others = self._gathered(part)
        torch.add(first, second, out=part)
        for other in others:
            part.add_(other)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """Return the columns of all ranks beside each other: (rows, ranks * columns)."""
        return self._gathered(part).transpose(0, 1).reshape(len(part), -1)

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Return the parts of all ranks: (ranks, rows, columns)."""
        parts = torch.empty(self.ranks * len(part), part.shape[1], dtype=part.dtype, device=part.device)
        _gather(parts, part)
        return parts.view(self.ranks, *part.shape)
