"""Formats of packed weights: how a matrix lies in memory for the matrix products.

A packed matrix is a row of panels of `PANEL` outputs each. A panel holds its outputs' weights input by input, so that a
product reads it once from beginning to end. Outputs i and i + 16 of a panel are neighbours: one 32-bit word of bfloat16
holds both, and one byte of 4-bit weights.

    float32    32 floats per input
    bfloat16   16 words per input; word i holds output i in its lower and output i + 16 in its upper half
    int8       per block of 32 inputs: 32 scales d (float16), then 32 bytes per input; w = d q. GGUF's Q8_0
    int4       per block of 32 inputs: 32 scales d and 32 minima m (float16), then 16 bytes per input; byte i holds
               output i in its lower and output i + 16 in its upper four bits; w = d q + m. GGUF's Q4_1, and Q4_0 with
               m = -8 d

Inputs are padded to a multiple of `SCALE_BLOCK`, outputs to a multiple of two panels, with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.models.bfloat16 import nearest_bits, to_floats

PANEL: Final = 32
SCALE_BLOCK: Final = 32
"""Inputs that share a scale."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Sizes of one format, in bytes."""

    number: int
    """Its number in compiled code."""
    input_bytes: int
    """One input of a panel."""
    scale_bytes: int = 0
    """Scales (and minima) before each block of a panel."""

    def panel_bytes(self, inputs: int) -> int:
        """Return the size of a panel with this many (padded) inputs."""
        return inputs * self.input_bytes + inputs // SCALE_BLOCK * self.scale_bytes


FORMATS: Final = {
    "float32": WeightFormat(0, PANEL * 4),
    "bfloat16": WeightFormat(1, PANEL * 2),
    "int8": WeightFormat(2, PANEL, PANEL * 2),
    "int4": WeightFormat(3, PANEL // 2, PANEL * 4),
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in blocks of 32 inputs: integers (outputs, inputs), and scales (outputs, inputs / 32)."""

    quanta: NDArray[np.int8]
    """-127 to 127 without minima, 0 to 15 with minima."""
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix."""

    format: str
    outputs: int
    inputs: int
    data: NDArray[np.uint8]

    @property
    def padded_outputs(self) -> int:
        """Number of outputs that the panels hold."""
        return padded(self.outputs, 2 * PANEL)

    @property
    def padded_inputs(self) -> int:
        """Number of inputs that the panels hold."""
        return padded(self.inputs, SCALE_BLOCK)

    @property
    def panel_bytes(self) -> int:
        """Size of a panel."""
        return FORMATS[self.format].panel_bytes(self.padded_inputs)


def padded(count: int, multiple: int) -> int:
    """Return `count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def pack(weight: NDArray[np.float32] | NDArray[np.uint16] | Blocks, form: str) -> Packed:
    """Pack a matrix (outputs, inputs): float32, bits of bfloat16 (uint16), or blocks.

    float32 and bfloat16 convert into every format but int4, rounded to nearest; blocks keep their integers and come
    only into their own format (int4 with minima, else int8).
    """
    if isinstance(weight, Blocks):
        return _pack_blocks(weight, form)
    outputs, inputs = weight.shape
    if form == "int8":
        return replace(_pack_blocks(quantized(_floats(weight)), form), inputs=inputs)
    if form == "bfloat16":
        bits = weight if weight.dtype == np.uint16 else nearest_bits(_floats(weight))
        panels = _panels(bits, np.uint16)  # (panels, inputs, 32)
        data = np.stack([panels[..., :16], panels[..., 16:]], axis=-1)
    elif form == "float32":
        data = _panels(_floats(weight), np.float32)
    else:
        raise ValueError(f"a matrix without blocks can't be packed as {form}")
    return Packed(form, outputs, inputs, _bytes(data))


def quantized(weight: NDArray[np.float32]) -> Blocks:
    """Return the matrix in int8 blocks, its inputs padded to whole blocks, as GGUF's Q8_0: symmetric, the largest
    magnitude of a block is 127."""
    outputs, inputs = weight.shape
    whole = np.zeros((outputs, padded(inputs, SCALE_BLOCK)), np.float32)
    whole[:, :inputs] = weight
    blocks = whole.reshape(outputs, -1, SCALE_BLOCK)
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
    quanta = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return Blocks(quanta.reshape(outputs, -1), scales.astype(np.float16))


def _pack_blocks(weight: Blocks, form: str) -> Packed:
    expected = "int8" if weight.minima is None else "int4"
    if form != expected:
        raise ValueError(f"blocks of {expected} can't be packed as {form}")
    outputs, inputs = weight.quanta.shape
    if inputs % SCALE_BLOCK:
        raise ValueError(f"{inputs} inputs are no whole blocks of {SCALE_BLOCK}")
    quanta = _panels(weight.quanta.view(np.uint8), np.uint8).reshape(-1, inputs // SCALE_BLOCK, SCALE_BLOCK, PANEL)
    scales = [weight.scales] if weight.minima is None else [weight.scales, weight.minima]
    heads = [
        _panels(part.view(np.uint16), np.uint16, SCALE_BLOCK).view(np.uint8) for part in scales
    ]  # (panels, blocks, 64)
    if weight.minima is not None:
        quanta = quanta[..., :16] | quanta[..., 16:] << 4
    rows = quanta.reshape(*quanta.shape[:2], -1)
    return Packed(form, outputs, inputs, _bytes(np.concatenate([*heads, rows], axis=-1)))


def _panels(weight: NDArray[Any], dtype: type, unit: int = 1) -> NDArray[Any]:
    """Return (outputs, inputs) as zero-padded panels: (panels, inputs, 32). unit: inputs that a column stands for."""
    outputs, inputs = weight.shape
    whole: NDArray[Any] = np.zeros((padded(outputs, 2 * PANEL), padded(inputs, SCALE_BLOCK // unit)), dtype)
    whole[:outputs, :inputs] = weight
    return np.ascontiguousarray(whole.reshape(-1, PANEL, whole.shape[1]).swapaxes(1, 2))


def _bytes(data: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _floats(weight: NDArray[np.float32] | NDArray[np.uint16]) -> NDArray[np.float32]:
    if weight.dtype == np.uint16:
        return to_floats(weight.view(np.uint16))
    return weight.astype(np.float32, copy=False)
