"""Attention over a cache of blocks on the CPU: one call per layer for the whole batch, compiled by numba.

There are two reasons for a kernel of our own. Blocks lie anywhere, so that sessions can share them, but torch's
attention needs each session's keys contiguous, which means a copy per step. And a position's output must have the same
bits whatever else is in the batch. Here that holds by construction. A row (one query of one head) processes the blocks
of its session in order, each with the same instructions, and online softmax (Milakov and Gimelshein, arXiv 1805.02867)
carries its state from block to block. Rows share only the keys they read. A block that is masked for a row leaves the
row's state unchanged.

Layouts, `BLOCK` = 64 tokens, per layer, both zero at first:
    keys    (block, kv head, depth, token)           depth is the head size rounded up to 4
    values  (block, kv head, slab, token, 64)        a slab is 64 of the head's columns
Keys are stored transposed, so that scores and weighted values are the same product `C[4, 64] += A[4, depth] @
B[depth, 64]`, whose inner loop runs over 64 neighbours. The compiler vectorises it because its trip counts are
constants. It widens bfloat16 while loading, accumulates in float32, and reads each key once for four rows.

The source alone fixes every bit: each multiplication that is fused with an addition is written as `fma`, each sum names
its order, and no function has a fast-math flag. With such flags (`contract`, `reassoc`) the compiler may choose per
compilation. Measured on a CPU with AVX2: a process that had compiled the kernel and one that had loaded the same
kernel from numba's cache gave different bits, because a call was bound to another copy of the function of that name.

Work is divided into (span, kv head) tickets that threads draw from a counter. The threads are those of torch's own
OpenMP runtime (a second pool would compete with it for the cores).
"""

# numba's annotations cover neither its intrinsics nor the types in compiled code.
# mypy: disable-error-code="arg-type, call-arg, var-annotated, attr-defined, no-untyped-call"

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from shared.engine.blocks import BLOCK

ROWS: Final = 4
"""Rows that share one pass over a block's keys."""

# Fields of a job, 64-bit words. Addresses point to contiguous arrays; float32 values are passed as their bits.
TICKET, SEAT, TICKETS, QUERY, KEY, VALUE, OUT, KEYS, VALUES, SPANS, TABLES, TABLE_WIDTH = range(12)
HEADS, GROUP, DEPTH, HEAD_SIZE, SLABS, SCALE, WINDOW, SCRATCH, SCRATCH_SIZE, MAX_ROWS = range(12, 22)
JOB_WORDS: Final = 22

# Fields of a span: consecutive new tokens of one session.
SPAN_TABLE, SPAN_ROW, SPAN_POSITION, SPAN_COUNT = range(4)
SPAN_WORDS: Final = 4

NOTHING: Final = np.float32(-3e38)
"""Score of a masked key, and a row's maximum before its first key."""


def scratch_floats(rows: int, depth: int, slabs: int) -> int:
    """Return the size of a thread's scratch buffer for spans of `rows` rows, as `attend_span` divides it."""
    return rows * (depth + slabs * 64 + 2) + ROWS * BLOCK + BLOCK // 2


@intrinsic
def widen(typingctx: Any, x: Any) -> Any:
    """Return the float32 of a stored value: bfloat16 bits (uint16), float32 bits (int32), or float32 itself."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[0]
        if x == types.uint16:
            value = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(x), emit


@intrinsic
def narrow(typingctx: Any, x: Any, like: Any) -> Any:
    """Return a float32 in the type of `like`: rounded to nearest even for bfloat16 (uint16), unchanged for float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like(types.float32, like), emit


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """Return the pointer to an integer address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), emit


@intrinsic
def draw(typingctx: Any, job: Any, word: Any) -> Any:
    """Return a counter of the job and increment it, atomically."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(job, word), emit


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z with one rounding, in float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), emit


@njit(inline="always")
def larger(x: Any, y: Any) -> Any:
    """Return the larger of two floats; `y` if one is NaN. A single vector instruction, unlike Python's `max`."""
    return x if x > y else y


@njit(inline="always")
def exp2(x: Any) -> Any:
    """Return 2^x for x <= 0, relative error below 2e-7; x below -126 counts as -126. Cephes' polynomial of exp2f."""
    x = larger(x, np.float32(-126.0))
    whole = np.floor(x + np.float32(0.5))
    part = x - whole
    y = np.float32(1.535336188319500e-4)
    y = fma(y, part, np.float32(1.339887440266574e-3))
    y = fma(y, part, np.float32(9.618437357674640e-3))
    y = fma(y, part, np.float32(5.550332471162809e-2))
    y = fma(y, part, np.float32(2.402264791363012e-1))
    y = fma(y, part, np.float32(6.931472028550421e-1))
    y = fma(y, part, np.float32(1.0))
    return y * widen(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


# Arrays are passed as slices that begin where the work does: the compiler adds Python's wrap-around of negative indices
# to any index that it cannot prove to be positive, and does not vectorise such a loop.
@njit
def multiply_add(c: Any, a: Any, b: Any, depth: int) -> None:
    """C[4, 64] += A[4, depth] @ B[depth, 64], flat and row-major; depth is a multiple of 4."""
    for k in range(0, depth, 4):
        a00, a01, a02, a03 = a[k], a[k + 1], a[k + 2], a[k + 3]
        a10, a11, a12, a13 = a[depth + k], a[depth + k + 1], a[depth + k + 2], a[depth + k + 3]
        a20, a21, a22, a23 = a[2 * depth + k], a[2 * depth + k + 1], a[2 * depth + k + 2], a[2 * depth + k + 3]
        a30, a31, a32, a33 = a[3 * depth + k], a[3 * depth + k + 1], a[3 * depth + k + 2], a[3 * depth + k + 3]
        row = b[k * 64 : k * 64 + 256]
        for n in range(64):
            x0, x1, x2, x3 = widen(row[n]), widen(row[64 + n]), widen(row[128 + n]), widen(row[192 + n])
            c[n] = fma(a03, x3, fma(a02, x2, fma(a01, x1, fma(a00, x0, c[n]))))
            c[64 + n] = fma(a13, x3, fma(a12, x2, fma(a11, x1, fma(a10, x0, c[64 + n]))))
            c[128 + n] = fma(a23, x3, fma(a22, x2, fma(a21, x1, fma(a20, x0, c[128 + n]))))
            c[192 + n] = fma(a33, x3, fma(a32, x2, fma(a31, x1, fma(a30, x0, c[192 + n]))))


# The two reductions fold the upper half onto the lower until one value is left. This order fills the vector lanes
# without permission to reassociate. `fold` is a buffer of 32 floats.
@njit
def highest(scores: Any, fold: Any) -> Any:
    """Return the maximum of 64 scores."""
    for t in range(32):
        fold[t] = larger(scores[t], scores[32 + t])
    for t in range(16):
        fold[t] = larger(fold[t], fold[16 + t])
    for t in range(8):
        fold[t] = larger(fold[t], fold[8 + t])
    for t in range(4):
        fold[t] = larger(fold[t], fold[4 + t])
    return larger(larger(fold[0], fold[2]), larger(fold[1], fold[3]))


@njit
def weigh(scores: Any, top: Any, fold: Any) -> Any:
    """Replace 64 scores by 2^(score - top), 0 where masked, and return their sum."""
    for t in range(64):
        score = scores[t]
        weight = exp2(score - top)
        scores[t] = weight if score > np.float32(-1e38) else np.float32(0)
    for t in range(32):
        fold[t] = scores[t] + scores[32 + t]
    for t in range(16):
        fold[t] = fold[t] + fold[16 + t]
    for t in range(8):
        fold[t] = fold[t] + fold[8 + t]
    for t in range(4):
        fold[t] = fold[t] + fold[4 + t]
    return (fold[0] + fold[2]) + (fold[1] + fold[3])


@njit(error_model="numpy")
def attend_span(
    q: Any, out: Any, keys: Any, values: Any, table: Any, span: Any, head: int, job: Any, scratch: Any
) -> None:
    """Attend with the query heads of one kv head, for the tokens of one span.

    q, out: (token, kv head, group, head size), flat. scratch: this thread's float32 buffer.
    """
    heads, group, depth, size, slabs, window = (
        job[HEADS],
        job[GROUP],
        job[DEPTH],
        job[HEAD_SIZE],
        job[SLABS],
        job[WINDOW],
    )
    scale = widen(np.int32(job[SCALE]))
    first, position, count = span[SPAN_ROW], span[SPAN_POSITION], span[SPAN_COUNT]
    rows = count * group
    tiles = (rows + ROWS - 1) // ROWS
    most = job[MAX_ROWS]
    query = scratch[: most * depth]
    acc = scratch[most * depth : most * (depth + slabs * 64)]  # (tile, slab, 4, 64)
    top = scratch[most * (depth + slabs * 64) : most * (depth + slabs * 64 + 1)]
    total = scratch[most * (depth + slabs * 64 + 1) : most * (depth + slabs * 64 + 2)]
    scores = scratch[most * (depth + slabs * 64 + 2) :][: ROWS * 64]
    fold = scratch[most * (depth + slabs * 64 + 2) + ROWS * 64 :][:32]
    for r in range(tiles * ROWS):
        top[r] = NOTHING
        total[r] = 0
        row = query[r * depth : (r + 1) * depth]
        for d in range(depth):
            row[d] = 0
        if r < rows:
            source = q[(((first + r // group) * heads + head) * group + r % group) * size :]
            for d in range(size):
                row[d] = widen(source[d]) * scale
    for i in range(tiles * slabs * ROWS * 64):
        acc[i] = 0

    start = max(position - window + 1, 0) // BLOCK if window else 0
    for b in range(start, (position + count - 1) // BLOCK + 1):
        block = np.int64(table[b]) * heads + head
        begin = b * BLOCK
        block_keys = keys[block * depth * BLOCK : (block + 1) * depth * BLOCK]
        block_values = values[block * slabs * BLOCK * 64 : (block + 1) * slabs * BLOCK * 64]
        for tile in range(max(begin - position, 0) * group // ROWS, tiles):
            for i in range(ROWS * 64):
                scores[i] = 0
            multiply_add(scores, query[tile * ROWS * depth : (tile + 1) * ROWS * depth], block_keys, depth)
            sums = acc[tile * slabs * ROWS * 64 : (tile + 1) * slabs * ROWS * 64]
            for j in range(ROWS):
                r = tile * ROWS + j
                mine = scores[j * 64 : (j + 1) * 64]
                here = position + min(r, rows - 1) // group - begin
                if here < BLOCK - 1:
                    for t in range(64):
                        mine[t] = mine[t] if t <= here else NOTHING
                if window and here >= window:
                    for t in range(64):
                        mine[t] = mine[t] if t > here - window else NOTHING
                higher = larger(top[r], highest(mine, fold))
                shrink = exp2(top[r] - higher)
                top[r] = higher
                total[r] = fma(total[r], shrink, weigh(mine, higher, fold))
                for slab in range(slabs):
                    part = sums[(slab * ROWS + j) * 64 : (slab * ROWS + j + 1) * 64]
                    for n in range(64):
                        part[n] = part[n] * shrink
            for slab in range(slabs):
                multiply_add(
                    sums[slab * ROWS * 64 : (slab + 1) * ROWS * 64],
                    scores,
                    block_values[slab * BLOCK * 64 : (slab + 1) * BLOCK * 64],
                    BLOCK,
                )

    for r in range(rows):
        target = out[(((first + r // group) * heads + head) * group + r % group) * size :]
        share = np.float32(1) / total[r]
        for slab in range(slabs):
            part = acc[(((r // ROWS) * slabs + slab) * ROWS + r % ROWS) * 64 :]
            piece = target[slab * 64 :]
            for n in range(min(size - slab * 64, 64)):
                piece[n] = narrow(part[n] * share, piece[n])


@njit
def store_span(k: Any, v: Any, keys: Any, values: Any, table: Any, span: Any, job: Any) -> None:
    """Write the new keys and values of one span, all heads, into its blocks."""
    heads, depth, size, slabs = job[HEADS], job[DEPTH], job[HEAD_SIZE], job[SLABS]
    for i in range(span[SPAN_COUNT]):
        position = span[SPAN_POSITION] + i
        block, t = np.int64(table[position // BLOCK]), position % BLOCK
        for head in range(heads):
            source = ((span[SPAN_ROW] + i) * heads + head) * size
            key, value = k[source : source + size], v[source : source + size]
            column = keys[(block * heads + head) * depth * BLOCK + t :]
            for d in range(size):
                column[d * BLOCK] = key[d]
            for slab in range(slabs):
                piece = values[(((block * heads + head) * slabs + slab) * BLOCK + t) * 64 :]
                part = value[slab * 64 :]
                for n in range(min(size - slab * 64, 64)):
                    piece[n] = part[n]


@njit(inline="always")
def draw_spans(address: Any, element: Any, storing: bool) -> None:
    """Do one thread's part of a job: draw tickets until none is left."""
    job = carray(address, JOB_WORDS)
    q = carray(pointer(job[QUERY]), 1 << 40, element)
    k = carray(pointer(job[KEY]), 1 << 40, element)
    v = carray(pointer(job[VALUE]), 1 << 40, element)
    out = carray(pointer(job[OUT]), 1 << 40, element)
    keys = carray(pointer(job[KEYS]), 1 << 40, element)
    values = carray(pointer(job[VALUES]), 1 << 40, element)
    spans = carray(pointer(job[SPANS]), (1 << 30, SPAN_WORDS), np.int64)
    tables = carray(pointer(job[TABLES]), (1 << 30, job[TABLE_WIDTH]), np.int32)
    scratch = carray(pointer(job[SCRATCH]), (1 << 20, job[SCRATCH_SIZE]), np.float32)[draw(address, SEAT)]
    while True:
        ticket = draw(address, TICKET)
        if ticket >= job[TICKETS]:
            return
        if storing:
            span = spans[ticket]
            store_span(k, v, keys, values, tables[span[SPAN_TABLE]], span, job)
        else:
            span = spans[ticket // job[HEADS]]
            attend_span(q, out, keys, values, tables[span[SPAN_TABLE]], span, ticket % job[HEADS], job, scratch)


def store_bfloat16(address: Any) -> None:
    draw_spans(address, np.uint16, True)


def attend_bfloat16(address: Any) -> None:
    draw_spans(address, np.uint16, False)


def store_float32(address: Any) -> None:
    draw_spans(address, np.float32, True)


def attend_float32(address: Any) -> None:
    draw_spans(address, np.float32, False)


@dataclass(frozen=True)
class Entry:
    """A compiled entry point: its address, and a function that calls it on this thread alone."""

    address: int
    call: Callable[[int], None]
    owner: Any
    """Reference that keeps the machine code alive."""


@cache
def compiled(dtype: torch.dtype) -> tuple[Entry, Entry]:
    """Return the entry points for storing and attending with this element type.

    Compiling takes some seconds the first time on a machine. Later calls load numba's cache.
    """
    sources = {
        torch.bfloat16: (store_bfloat16, attend_bfloat16),
        torch.float32: (store_float32, attend_float32),
    }[dtype]
    store, attend = map(_compile, sources)
    return store, attend


def _compile(source: Callable[[Any], None]) -> Entry:
    signature = types.void(types.CPointer(types.int64))
    try:
        code = cfunc(signature, cache=True)(source)
    except RuntimeError:  # no folder that numba could keep its cache in, as on a read-only file system
        code = cfunc(signature)(source)
    return Entry(code.address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address), code)


@cache
def parallel_region() -> Callable[[int, int, int, int], None] | None:
    """Return `GOMP_parallel(function, argument, threads, flags)` of torch's OpenMP runtime; None without one."""
    try:
        region = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    region.restype = None
    return region


def run(entry: Entry, job: np.ndarray[Any, Any], tickets: int, threads: int) -> None:
    """Run a job with at most this many threads, and no more than tickets. The GIL is released."""
    job[TICKET] = job[SEAT] = 0
    job[TICKETS] = tickets
    region = parallel_region()
    if region is None or min(threads, tickets) < 2:
        entry.call(job.ctypes.data)
    else:
        region(entry.address, job.ctypes.data, min(threads, tickets), 0)
