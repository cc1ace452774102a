"""Tables of rotary position embedding on a device."""

from __future__ import annotations

import torch

from shared.gpu_kernels.plan import width
from shared.models.description import Rope
from shared.models.rope import rotation_table


class DeviceRotations:
    """Tables of cosines and sines on the device, one pair per rope, as long as the longest session needs."""

    def __init__(self, ropes: set[Rope | None], torch_device: torch.device) -> None:
        self._ropes, self._torch_device = [rope for rope in ropes if rope], torch_device
        self._length = 0
        self._tables: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self._none = torch.zeros(1, device=torch_device)

    def cover(self, length: int) -> bool:
        """Have positions up to `length`. Returns whether the tables have moved."""
        if length <= self._length:
            return False
        self._length = width(length, 1024)
        for rope in self._ropes:
            cosines, sines = rotation_table(rope, self._length)
            self._tables[rope] = (
                torch.from_numpy(cosines).to(self._torch_device),
                torch.from_numpy(sines).to(self._torch_device),
            )
        return True

    def tables(self, rope: Rope | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a rope's cosines and sines, each (positions, pairs)."""
        return self._tables[rope] if rope else (self._none, self._none)
