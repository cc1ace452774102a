"""Packing of the target's hidden states for messages to a drafter, without torch.

In a process a row is the bits of its bfloat16 elements, uint16 (rows, hidden size). In a message it is those bits
(`bfloat16`, exact), or int8 elements with one float32 scale per row, such that the row's largest magnitude is 127
(`int8`: each element within half a scale of its bfloat16 value, in half the bytes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.messages import HiddenFormat, HiddenStates
from shared.models.bfloat16 import to_floats

PART_BYTES = 1_000_000
"""Largest part. A longer run is split, so that a prompt's rows do not delay other messages on the connection."""

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """Packed rows of consecutive positions, as in `HiddenStates`."""

    start: int
    count: int
    size: int
    format: HiddenFormat
    rows: bytes
    scales: bytes


def parts(bits: Bits, start: int, form: HiddenFormat) -> Iterator[Part]:
    """Yield rows (rows, hidden size) from position `start` on as packed parts of at most `PART_BYTES`, in order."""
    total, size = bits.shape
    step = max(1, PART_BYTES // (size * form.width))
    for first in range(0, total, step):
        some = bits[first : first + step]
        rows, scales = pack(some, form)
        yield Part(start + first, len(some), size, form, rows, scales)


def pack(bits: Bits, form: HiddenFormat) -> tuple[bytes, bytes]:
    """Return rows (rows, hidden size) as the bytes of elements and scales; bfloat16 has no scales."""
    if form is HiddenFormat.BFLOAT16:
        return bits.astype("<u2", copy=False).tobytes(), b""
    values = to_floats(bits)
    with np.errstate(invalid="ignore"):  # a row with NaN or infinities gets such a scale
        scales = np.abs(values).max(axis=1, initial=0) / np.float32(127)
        values /= np.where(scales > 0, scales, 1)[:, None]
        # Clipped because a scale near the end of float32's range has lost its precision.
        elements = np.rint(values, out=values).clip(-127, 127, out=values).astype(np.int8)
    return elements.tobytes(), scales.astype("<f4", copy=False).tobytes()


def unpack(message: HiddenStates) -> Floats:
    """Return the rows of a message: (count, hidden size)."""
    shape = message.count, message.size
    if message.format is HiddenFormat.BFLOAT16:
        return to_floats(np.frombuffer(message.rows, "<u2").reshape(shape))
    values = np.frombuffer(message.rows, np.int8).reshape(shape).astype(np.float32)
    values *= np.frombuffer(message.scales, "<f4")[:, None]
    return values
