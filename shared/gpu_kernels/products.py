"""Weights on a device, padded to whole tiles, and the tiles that products are computed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.gpu_kernels.plan import ROW_TILE
from shared.kernels.finite import require_finite, require_in_range
from shared.kernels.formats import Blocks, padded
from shared.models.bfloat16 import to_floats
from shared.models.description import Linear, WeightName

ReadWeight = Callable[[WeightName], NDArray[Any] | Blocks]
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Formats of weights, of operands, and of keys and values."""


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """Sizes of a product's tiles. They change no bit where the check at load allows `WIDE` (`check`)."""

    rows: int
    outputs: int


NARROW: Final = ProductTiles(16, 32)
WIDE: Final = ProductTiles(ROW_TILE, 64)
WIDE_FROM: Final = 64
"""Rows from which wide tiles are taken."""


@dataclass(frozen=True, slots=True)
class DeviceProduct:
    """A matrix on the device with its bias in float32: (outputs, inputs), padded with zeros to whole tiles."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: int

    @property
    def depth(self) -> int:
        """Number of padded inputs."""
        return self.weight.shape[1]

    @property
    def padded_outputs(self) -> int:
        """Number of padded outputs."""
        return self.weight.shape[0]

    def options(self, tiles: ProductTiles, *, gated: bool = False) -> dict[str, int]:
        """Return a kernel's constants and options for these tiles. Steps over the inputs depend on the weight alone.

        gated: two weights are multiplied at once, whose tiles must fit into the shared memory of capability 8.6.
        """
        in_float32 = self.weight.dtype == torch.float32  # no tensor cores: a large tile would be very long code
        return {
            "DEPTH": self.depth,
            "BLOCK_M": min(tiles.rows, 32) if in_float32 else tiles.rows,
            "BLOCK_N": tiles.outputs,
            "BLOCK_K": 32 if in_float32 else 64 if gated or self.depth % 128 else 128,
            "num_warps": 4,
            "num_stages": 2 if in_float32 else 3,
        }


class WeightLoader:
    """Reads weights one by one into the device's memory, each converted there, so that no second copy is held."""

    def __init__(self, read: ReadWeight, form: str, torch_device: torch.device) -> None:
        self._read, self._form, self._torch_device = read, form, torch_device

    def vector(self, name: WeightName, offset: float = 0.0) -> torch.Tensor:
        """Return a vector as float32, plus an offset."""
        values = self._checked(name)
        floats = to_floats(values) if values.dtype == np.uint16 else values
        return torch.from_numpy(floats + np.float32(offset)).to(self._torch_device)

    def product(self, parts: Sequence[Linear], *, biased: bool = False) -> DeviceProduct:
        """Return the product whose outputs are those of several ones, in order. biased: have a bias, if only of zeros.

        Raises ModelError for values that the format cannot hold.
        """
        matrices = [self._checked(part.weight) for part in parts]
        outputs, inputs = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
        shape = padded(outputs, ROW_TILE), padded(inputs, ROW_TILE)
        weight = torch.zeros(shape, dtype=DTYPES[self._form], device=self._torch_device)
        biases = biased or any(part.bias for part in parts)
        bias = torch.zeros(shape[0], device=self._torch_device) if biases else None
        first = 0
        for part, matrix in zip(parts, matrices, strict=True):
            rows = slice(first, first + len(matrix))
            weight[rows, :inputs] = _tensor(matrix)
            if part.bias and bias is not None:
                bias[rows] = self.vector(part.bias)
            first = rows.stop
        return DeviceProduct(weight, bias, outputs)

    def _checked(self, name: WeightName) -> NDArray[Any]:
        values = self._read(name)
        if isinstance(values, Blocks):
            raise EngineError(
                f"the weight {name.name} is in blocks of integers, which the kernels for GPUs do not have"
            )
        require_finite(name.name, values)
        if values.dtype == np.float32 or self._form == "float16":
            floats = to_floats(values) if values.dtype == np.uint16 else values
            require_in_range(name.name, floats, self._form)
        return values


def _tensor(matrix: NDArray[Any]) -> torch.Tensor:
    """Return a matrix, float32 or bits of bfloat16, as a tensor on the host."""
    if matrix.dtype == np.uint16:
        return torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(matrix)
