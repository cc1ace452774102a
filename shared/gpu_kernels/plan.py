"""The arrays of a batch that kernels read: one buffer of 32-bit words, copied to the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.kernels.cache import PackedBatch, positions_of
from shared.kernels.layout import BLOCK

ROW_TILE: Final = 64
"""Rows of the largest tile. Buffers have whole ones."""
RUN_FLOATS: Final = 1 << 24
"""Most floats of the runs' results. Batches beyond compute the runs of a span one after the other."""
ALIGNMENT: Final = 64
"""Sections begin at multiples of this many words."""
SPAN_WORDS: Final = 4
ROW_SECTIONS: Final = 4 + SPAN_WORDS
"""Words per row before the tables: token, position, slot, wanted row, and a span."""


def width(count: int, least: int = 1) -> int:
    """Return the next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class LaunchPlan:
    """A packed batch for buffers that have room for `capacity` rows."""

    words: NDArray[np.int32]
    """Sections of `capacity` rows each (tokens, positions, slots, wanted rows, spans of `SPAN_WORDS`), then the block
    tables one after the other."""
    spans: int
    runs: int
    """Runs of keys that the longest session has."""


def plan_batch(
    batch: PackedBatch, tokens: Sequence[int], wanted: Sequence[int], *, capacity: int, span_tokens: int, run: int
) -> LaunchPlan:
    """Lay out a batch. Rows, spans and wanted rows up to the capacity are inert: they write nothing that is read.

    capacity: multiple of `ALIGNMENT`, at least the rows. span_tokens: most tokens of a span. run: tokens of a run.
    """
    positions = positions_of(batch)
    rows = len(positions)
    offsets = np.concatenate([[0], np.cumsum([len(table) for table in batch.tables])])
    words = np.zeros(ROW_SECTIONS * capacity + int(offsets[-1]), np.int32)
    sections = words[: 4 * capacity].reshape(4, capacity)
    spans = words[4 * capacity : ROW_SECTIONS * capacity].reshape(capacity, SPAN_WORDS)
    tables = words[ROW_SECTIONS * capacity :]
    sections[0, :rows], sections[1, :rows] = tokens, positions
    sections[2] = -1
    sections[3, : len(wanted)] = wanted
    row = number = 0
    for offset, table, start, count in zip(offsets[:-1], batch.tables, batch.starts, batch.counts, strict=True):
        tables[offset : offset + len(table)] = table
        own = positions[row : row + count]
        sections[2, row : row + count] = tables[offset + own // BLOCK] * BLOCK + own % BLOCK
        for done in range(0, count, span_tokens):
            spans[number] = row + done, start + done, min(span_tokens, count - done), offset
            number += 1
        row += count
    return LaunchPlan(words, number, int(positions.max()) // run + 1)
