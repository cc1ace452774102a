"""The KV cache's memory, and the attention jobs over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.kernels.layout import AttentionWord, SpanWord, key_bytes, scratch_floats, value_bytes


@dataclass(frozen=True, slots=True)
class KvShape:
    """Keys and values of one model: layers, kv heads, query heads, size of a head (all layers alike)."""

    layers: int
    kv_heads: int
    heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The sessions of one packed row, in order: block tables, counts of held tokens, counts of new tokens."""

    tables: Sequence[Sequence[int]]
    starts: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """Options of a layer's scores: their factor, the window (0 for none), the softcap (0 for none), and the size of the
    chunks of tokens that do not attend to each other (0 for none)."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    chunk: int = 0


class BlockMemory:
    """Keys and values of all blocks and layers, in "float32" or "bfloat16", and a job of attention per layer."""

    def __init__(self, shape: KvShape, layers: Sequence[ScoreOptions], blocks: int, form: str) -> None:
        self.shape, self.form = shape, form
        heads = blocks * shape.kv_heads
        # Untouched zeros: their memory is allocated on first use.
        self._keys = np.zeros((shape.layers, heads * key_bytes(form, shape.head_size)), np.uint8)
        self._values = np.zeros((shape.layers, heads * value_bytes(form, shape.head_size)), np.uint8)
        self.keys = self._keys.reshape(shape.layers, blocks, -1)
        self.values = self._values.reshape(shape.layers, blocks, -1)
        group = shape.heads // shape.kv_heads
        self._span = max(256 // group, 1)
        self.scratch_floats = scratch_floats(self._span * group, shape.head_size)
        self.jobs = np.zeros((shape.layers, len(AttentionWord)), np.int64)
        jobs = self.jobs
        jobs[:, AttentionWord.KEYS] = [row.ctypes.data for row in self._keys]
        jobs[:, AttentionWord.VALUES] = [row.ctypes.data for row in self._values]
        jobs[:, AttentionWord.HEADS], jobs[:, AttentionWord.GROUP] = shape.kv_heads, group
        jobs[:, AttentionWord.HEAD_SIZE], jobs[:, AttentionWord.MAX_ROWS] = shape.head_size, self._span * group
        for number, layer in enumerate(layers):
            self.set_scores(number, layer)
        self._tables = np.zeros((0, 0), np.int32)
        self._spans = np.zeros((0, len(SpanWord)), np.int64)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys and values in all layers."""
        for rows in (self.keys, self.values):
            rows[:, target] = rows[:, source]

    @property
    def spans(self) -> int:
        """Number of spans of the current batch."""
        return len(self._spans)

    def set_scores(self, layer: int, scores: ScoreOptions) -> None:
        """Set the options of a layer's scores."""
        job = self.jobs[layer]
        job[AttentionWord.SCALE] = float_bits(scores.scale * math.log2(math.e))
        job[AttentionWord.SOFTCAP] = float_bits(scores.softcap)
        job[AttentionWord.WINDOW] = min(scores.window, 1 << 31)  # longer than any session
        job[AttentionWord.CHUNK] = min(scores.chunk, 1 << 31)

    def set_sinks(self, layer: int, address: int) -> None:
        """Set the address of a layer's sinks, float32 per query head, which the caller keeps; 0 for none."""
        self.jobs[layer, AttentionWord.SINKS] = address

    def begin(self, batch: PackedBatch) -> None:
        """Start a batch: the following jobs are for it."""
        self._tables = np.zeros((len(batch.tables), max(map(len, batch.tables))), np.int32)
        spans: list[tuple[int, int, int, int]] = []
        row = 0
        for i, (table, start, count) in enumerate(zip(batch.tables, batch.starts, batch.counts, strict=True)):
            self._tables[i, : len(table)] = table
            spans.extend(
                (i, row + done, start + done, min(self._span, count - done)) for done in range(0, count, self._span)
            )
            row += count
        spans.sort(key=lambda span: -(span[2] + span[3]) * span[3])  # long spans first, so that threads end together
        self._spans = np.array(spans, np.int64)
        self.jobs[:, AttentionWord.SPANS] = self._spans.ctypes.data
        self.jobs[:, AttentionWord.TABLES] = self._tables.ctypes.data
        self.jobs[:, AttentionWord.TABLE_WIDTH] = self._tables.shape[1]


def float_bits(value: float) -> int:
    """Return the bits of a float32, for a word of a job."""
    return int(np.float32(value).view(np.int32))


def positions_of(batch: PackedBatch) -> NDArray[np.int64]:
    """Return the positions of a batch's tokens."""
    return np.concatenate(
        [np.arange(start, start + count) for start, count in zip(batch.starts, batch.counts, strict=True)]
    )
