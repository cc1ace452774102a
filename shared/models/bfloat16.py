"""bfloat16 in NumPy, which lacks the type: the bits of a value as uint16, the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_floats(bits: NDArray[np.unsignedinteger]) -> NDArray[np.float32]:
    """Return the values of these bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def nearest_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 of each finite value, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
