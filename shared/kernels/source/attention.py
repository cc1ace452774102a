"""Attention over a cache of blocks on the CPU: online softmax, block by block.

There are two reasons for a kernel of our own. Blocks lie anywhere, so that sessions can share them, but torch's
attention needs each session's keys contiguous, which means a copy per step. And a position's output must have the same
bits whatever else is in the batch. Here that holds by construction. A row (one query of one head) processes the blocks
of its session in order, each with the same instructions, and online softmax (Milakov and Gimelshein, arXiv 1805.02867)
carries its state from block to block. Rows share only the keys they read. A block that is masked for a row leaves the
row's state unchanged.

Keys and values lie in the formats of packed weights (`formats`), so that scores and weighted sums are the products of
`products`. Per layer, both zero at first, for `BLOCK` = 64 tokens:
    keys    (block, kv head): a packed matrix with the tokens as outputs and the head's elements as inputs
    values  (block, kv head): a packed matrix with the head's elements as outputs and the tokens as inputs

Work is divided into (span, kv head) tickets.
"""

# numba's annotations cover neither its intrinsics nor the types in compiled code.
# mypy: disable-error-code="arg-type, call-arg, no-untyped-call, attr-defined, var-annotated"

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from shared.kernels.formats import FORMATS, PANEL
from shared.kernels.layout import BLOCK, UNPACKED_FLOATS, AttentionWord, SpanWord
from shared.kernels.source.functions import LOG2_E, exp2, larger, tanh
from shared.kernels.source.products import add_product, clear
from shared.kernels.source.vectors import (
    LANES,
    bits_of,
    fma,
    from_bits,
    get_float,
    get_int32,
    get_word,
    kernel,
    lane_max,
    lane_sum,
    load_vector,
    put_float,
    put_uint16,
    vector_add,
    vector_max,
)

# numba takes plain integers as constants.
(
    _QUERY,
    _KEY,
    _VALUE,
    _OUT,
    _QUERY_STRIDE,
    _KEY_STRIDE,
    _VALUE_STRIDE,
    _OUT_STRIDE,
    _KEYS,
    _VALUES,
    _SPANS,
    _TABLES,
    _TABLE_WIDTH,
    _HEADS,
    _GROUP,
    _HEAD_SIZE,
    _SCALE,
    _SOFTCAP,
    _WINDOW,
    _CHUNK,
    _SINKS,
    _MAX_ROWS,
) = map(int, AttentionWord)
_TABLE, _ROW, _POSITION, _COUNT = map(int, SpanWord)
_SPAN_BYTES: Final = 8 * len(SpanWord)

NOTHING: Final = np.float32(-3e38)
"""Score of a masked key, and a row's maximum before its first key."""


@kernel
def _highest(scores: int) -> float:
    """Return the maximum of 64 scores."""
    highest = load_vector(scores)
    for i in range(LANES, BLOCK, LANES):
        highest = vector_max(highest, load_vector(scores + 4 * i))
    return lane_max(highest)


@kernel
def _weigh(scores: int, top: float) -> float:
    """Replace 64 scores by 2^(score - top), 0 where masked, and return their sum."""
    for t in range(BLOCK):
        score = get_float(scores, t)
        put_float(scores, t, exp2(score - top) if score > np.float32(-1e38) else np.float32(0))
    total = load_vector(scores)
    for i in range(LANES, BLOCK, LANES):
        total = vector_add(total, load_vector(scores + 4 * i))
    return lane_sum(total)


@kernel
def _put(form: int, panel: int, input_: int, lane: int, value: float) -> None:
    """Write an element of a panel, rounded to nearest even in bfloat16 (form 1), as it is in float32 (form 0)."""
    if form == 0:
        put_float(panel, input_ * PANEL + lane, value)
        return
    bits = np.int64(bits_of(value)) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    put_uint16(panel, (input_ * PANEL // 2 + lane % (PANEL // 2)) * 2 + lane // (PANEL // 2), np.uint16(rounded))


def _phases(form: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the functions that do one ticket of storing and one of attending, for keys and values in this format.

    Arguments: address of the attention job, ticket, address of this thread's scratch buffer.
    """
    number, input_bytes = FORMATS[form].number, FORMATS[form].input_bytes

    @kernel
    def store_span(job: int, ticket: int, scratch: int) -> None:
        """Write the new keys and values of one span, all heads, into its blocks."""
        heads, size = get_word(job, _HEADS), get_word(job, _HEAD_SIZE)
        depth, panels = (size + PANEL - 1) // PANEL * PANEL, (size + 2 * PANEL - 1) // (2 * PANEL) * 2
        span = get_word(job, _SPANS) + ticket * _SPAN_BYTES
        table = get_word(job, _TABLES) + get_word(span, _TABLE) * get_word(job, _TABLE_WIDTH) * 4
        for i in range(get_word(span, _COUNT)):
            position = get_word(span, _POSITION) + i
            token = get_word(span, _ROW) + i
            block, t = np.int64(get_int32(table, position // BLOCK)), position % BLOCK
            for head in range(heads):
                place = block * heads + head
                key = get_word(job, _KEY) + 4 * (token * get_word(job, _KEY_STRIDE) + head * size)
                value = get_word(job, _VALUE) + 4 * (token * get_word(job, _VALUE_STRIDE) + head * size)
                keys = get_word(job, _KEYS) + (place * 2 + t // PANEL) * depth * input_bytes
                values = get_word(job, _VALUES) + place * panels * BLOCK * input_bytes
                for d in range(size):
                    _put(number, keys, d, t % PANEL, get_float(key, d))
                    _put(number, values + d // PANEL * BLOCK * input_bytes, t, d % PANEL, get_float(value, d))

    @kernel
    def attend_span(job: int, ticket: int, scratch: int) -> None:
        """Attend with the query heads of one kv head, for the tokens of one span."""
        heads, group, size = get_word(job, _HEADS), get_word(job, _GROUP), get_word(job, _HEAD_SIZE)
        depth, panels = (size + PANEL - 1) // PANEL * PANEL, (size + 2 * PANEL - 1) // (2 * PANEL) * 2
        width = panels * PANEL
        window, chunk, most = get_word(job, _WINDOW), get_word(job, _CHUNK), get_word(job, _MAX_ROWS)
        sinks = get_word(job, _SINKS)
        scale, softcap = from_bits(np.int32(get_word(job, _SCALE))), from_bits(np.int32(get_word(job, _SOFTCAP)))
        head = ticket % heads
        span = get_word(job, _SPANS) + ticket // heads * _SPAN_BYTES
        table = get_word(job, _TABLES) + get_word(span, _TABLE) * get_word(job, _TABLE_WIDTH) * 4
        first, position, count = get_word(span, _ROW), get_word(span, _POSITION), get_word(span, _COUNT)
        rows = count * group
        unpacked, query = scratch, scratch + 4 * UNPACKED_FLOATS
        sums = query + 4 * most * depth
        scores = sums + 4 * most * width
        tops = scores + 4 * most * BLOCK
        totals = tops + 4 * most
        for r in range(rows):
            if sinks:
                put_float(tops, r, get_float(sinks, head * group + r % group) * LOG2_E)
                put_float(totals, r, np.float32(1))
            else:
                put_float(tops, r, NOTHING)
                put_float(totals, r, np.float32(0))
            source = get_word(job, _QUERY)
            source += 4 * ((first + r // group) * get_word(job, _QUERY_STRIDE) + (head * group + r % group) * size)
            row = query + 4 * r * depth
            for d in range(size):
                put_float(row, d, get_float(source, d) * scale)
            for d in range(size, depth):
                put_float(row, d, np.float32(0))
        for i in range(rows * width):
            put_float(sums, i, np.float32(0))

        start = max(position - window + 1, 0) // BLOCK if window else 0
        if chunk:
            start = max(start, position // chunk * chunk // BLOCK)
        for b in range(start, (position + count - 1) // BLOCK + 1):
            place = np.int64(get_int32(table, b)) * heads + head
            begin = b * BLOCK
            skipped = max(begin - position, 0) * group  # rows of tokens before the block
            live = rows - skipped
            mine = scores + 4 * skipped * BLOCK
            clear(live, mine, 4 * BLOCK)
            add_product(
                number,
                live,
                query + 4 * skipped * depth,
                4 * depth,
                get_word(job, _KEYS) + place * 2 * depth * input_bytes,
                depth * input_bytes,
                depth,
                mine,
                4 * BLOCK,
                unpacked,
            )
            for r in range(skipped, rows):
                row = scores + 4 * r * BLOCK
                if softcap > np.float32(0):
                    for t in range(BLOCK):
                        put_float(row, t, tanh(get_float(row, t) / (softcap * LOG2_E)) * (softcap * LOG2_E))
                here = position + r // group - begin
                for t in range(here + 1, BLOCK):
                    put_float(row, t, NOTHING)
                if window:
                    for t in range(min(here - window + 1, BLOCK)):
                        put_float(row, t, NOTHING)
                if chunk:
                    for t in range(min((begin + here) // chunk * chunk - begin, BLOCK)):
                        put_float(row, t, NOTHING)
                old = get_float(tops, r)
                top = larger(old, _highest(row))
                shrink = exp2(old - top)
                put_float(tops, r, top)
                put_float(totals, r, fma(get_float(totals, r), shrink, _weigh(row, top)))
                part = sums + 4 * r * width
                for n in range(width):
                    put_float(part, n, get_float(part, n) * shrink)
            values = get_word(job, _VALUES) + place * panels * BLOCK * input_bytes
            for pair in range(panels // 2):
                add_product(
                    number,
                    live,
                    mine,
                    4 * BLOCK,
                    values + pair * 2 * BLOCK * input_bytes,
                    BLOCK * input_bytes,
                    BLOCK,
                    sums + 4 * (skipped * width + pair * 2 * PANEL),
                    4 * width,
                    unpacked,
                )

        for r in range(rows):
            target = get_word(job, _OUT)
            target += 4 * ((first + r // group) * get_word(job, _OUT_STRIDE) + (head * group + r % group) * size)
            share = np.float32(1) / get_float(totals, r)
            for n in range(size):
                put_float(target, n, get_float(sums, r * width + n) * share)

    return store_span, attend_span


STORE_BFLOAT16, ATTEND_BFLOAT16 = _phases("bfloat16")
STORE_FLOAT32, ATTEND_FLOAT32 = _phases("float32")
