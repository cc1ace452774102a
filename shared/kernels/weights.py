"""Weights of a pass's products: read from the model's files, checked, joined and packed for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.kernels.finite import require_finite, require_in_range
from shared.kernels.formats import FORMATS, PANEL, SCALE_BLOCK, Blocks, Packed, pack
from shared.models.bfloat16 import to_floats
from shared.models.description import Linear, WeightName

Floats = NDArray[np.float32]
Matrix = NDArray[Any] | Blocks
"""A weight as it is read: float32, bits of bfloat16 (uint16), or blocks of integers."""
ANOTHER_MODEL: Final = "the files are not of one model; download it again"
ReadWeight = Callable[[WeightName], Matrix]


class Product:
    """A packed matrix with its bias."""

    def __init__(self, packed: Packed, bias: Floats | None = None) -> None:
        self.packed = packed
        self.bias = None if bias is None else _padded_to(bias, packed.padded_outputs)

    def words(self) -> list[int]:
        """Return the words of `ProductWord`."""
        packed = self.packed
        return [
            FORMATS[packed.format].number,
            packed.data.ctypes.data,
            packed.panel_bytes,
            packed.padded_inputs,
            packed.padded_outputs // (2 * PANEL),
            0 if self.bias is None else self.bias.ctypes.data,
        ]


def read_product(read: ReadWeight, parts: Sequence[Linear], form: str) -> Product:
    """Return several linear layers as one product, whose outputs are theirs in order."""
    weights = [read_weight(read, part.weight, form) for part in parts]
    biases = None
    if any(part.bias for part in parts):
        biases = np.concatenate(
            [
                floats(read_weight(read, p.bias)) if p.bias else np.zeros(_outputs(w), np.float32)
                for p, w in zip(parts, weights, strict=True)
            ]
        )
    return Product(_packed(weights, _joined(weights), form), biases)


def read_gated_product(read: ReadWeight, gate: Linear, up: Linear, form: str) -> Product:
    """Return gate and up as one product, a panel of each in turn."""
    parts = [_in_panels(read_weight(read, part.weight, form)) for part in (gate, up)]
    order = np.arange(2 * _outputs(parts[0])).reshape(2, -1, PANEL).swapaxes(0, 1).reshape(-1)
    bias = None
    if gate.bias or up.bias:
        sides = [floats(read_weight(read, p.bias)) if p.bias else np.zeros(0, np.float32) for p in (gate, up)]
        bias = np.concatenate([_padded_to(side, _outputs(parts[0])) for side in sides])[order]
    return Product(_packed(parts, _rows(_joined(parts), order), form), bias)


def read_weight(read: ReadWeight, weight: WeightName, form: str = "float32") -> Matrix:
    """Read a weight. Raises ModelError if a value is not finite, or not within the range of this format."""
    matrix = read(weight)
    require_finite(weight.name, matrix)
    if not isinstance(matrix, Blocks):
        if matrix.dtype == np.float32:
            require_in_range(weight.name, matrix, form)
        elif form == "int8":
            require_in_range(weight.name, floats(matrix), form)
    return matrix


def require_size(product: Product, linear: Linear, outputs: int, inputs: int) -> None:
    """Raise ModelError with the name of the first weight if a product has other outputs or inputs."""
    found = product.packed.outputs, product.packed.inputs
    if found != (outputs, inputs):
        raise ModelError(
            f"the product of {linear.weight.name} is {found[0]} x {found[1]}, and must be {outputs} x {inputs}: "
            f"{ANOTHER_MODEL}"
        )


def floats(values: Matrix) -> Floats:
    """Return the values as float32. Values of uint16 are the bits of bfloat16."""
    assert not isinstance(values, Blocks)
    if values.dtype == np.uint16:
        return to_floats(values)
    return values.astype(np.float32, copy=False)


def _packed(parts: Sequence[Matrix], whole: Matrix, form: str) -> Packed:
    """Pack the parts, joined into a whole. Blocks of several kinds become float32, which keeps every value."""
    if isinstance(whole, Blocks):
        return pack(whole, "int8" if whole.minima is None else "int4")
    return pack(whole, "float32" if any(isinstance(part, Blocks) for part in parts) else form)


def _outputs(weight: Matrix) -> int:
    return len(weight.quanta) if isinstance(weight, Blocks) else len(weight)


def _joined(parts: Sequence[Matrix]) -> Matrix:
    if len(parts) == 1:
        return parts[0]
    blocks = [part for part in parts if isinstance(part, Blocks)]
    if len(blocks) == len(parts) and len({part.minima is None for part in blocks}) == 1:
        minima = [part.minima for part in blocks if part.minima is not None]
        return Blocks(
            np.concatenate([part.quanta for part in blocks]),
            np.concatenate([part.scales for part in blocks]),
            np.concatenate(minima) if minima else None,
        )
    if blocks or len({part.dtype for part in parts if not isinstance(part, Blocks)}) > 1:
        return np.concatenate([dense(part) for part in parts])
    return np.concatenate([part for part in parts if not isinstance(part, Blocks)])


def dense(weight: Matrix) -> Floats:
    """Return a matrix as float32."""
    if not isinstance(weight, Blocks):
        return floats(weight)
    scales = np.repeat(weight.scales.astype(np.float32), SCALE_BLOCK, axis=1)
    values = weight.quanta.astype(np.float32) * scales
    if weight.minima is not None:
        values += np.repeat(weight.minima.astype(np.float32), SCALE_BLOCK, axis=1)
    return values


def _rows(weight: Matrix, order: NDArray[np.int64]) -> Matrix:
    if not isinstance(weight, Blocks):
        return weight[order]
    minima = None if weight.minima is None else weight.minima[order]
    return Blocks(weight.quanta[order], weight.scales[order], minima)


def _in_panels(weight: Matrix) -> Matrix:
    """Return the matrix with its outputs padded by zeros to whole panels."""
    missing = -_outputs(weight) % PANEL
    if not missing:
        return weight

    def more(part: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])

    if not isinstance(weight, Blocks):
        return more(weight)
    return Blocks(more(weight.quanta), more(weight.scales), None if weight.minima is None else more(weight.minima))


def _padded_to(values: Floats, count: int) -> Floats:
    whole = np.zeros(count, np.float32)
    whole[: len(values)] = values
    return whole
