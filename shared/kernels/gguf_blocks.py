"""Matrices of GGUF in the blocks that the kernels compute with.

A block of 32 inputs is, in bytes:

    Q4_0    scale d (float16), then 16 bytes; w = d (q - 8). Inputs 0 to 15 are their lower, 16 to 31 their upper halves
    Q4_1    scale d and minimum m (float16), then 16 bytes; w = d q + m
    Q8_0    scale d (float16), then 32 signed bytes; w = d q
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.kernels.formats import SCALE_BLOCK, Blocks

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Size of a block, by type."""


def blocks_of(kind: str, data: NDArray[np.uint8]) -> Blocks:
    """Return the matrix of these bytes (outputs, bytes of a row). kind: of BLOCK_BYTES."""
    outputs = len(data)
    blocks = np.ascontiguousarray(data).reshape(outputs, -1, BLOCK_BYTES[kind])
    scales = _halves(blocks, 0)
    if kind == "Q8_0":
        return Blocks(np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(outputs, -1), scales)
    packed = blocks[:, :, -SCALE_BLOCK // 2 :]
    quanta = np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8).reshape(outputs, -1)
    # 8 is a power of two, so -8 d is exact.
    return Blocks(quanta, scales, _halves(blocks, 2) if kind == "Q4_1" else scales * np.float16(-8))


def _halves(blocks: NDArray[np.uint8], start: int) -> NDArray[np.float16]:
    """Return the float16 at this byte of each block, (outputs, blocks)."""
    return np.ascontiguousarray(blocks[:, :, start : start + 2]).view("<f2")[..., 0].astype(np.float16)
