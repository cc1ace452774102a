"""Matrix products of float32 rows with packed weights (`formats`), in float32.

Every output is one chain of `fma` over the inputs in ascending order. So its bits depend neither on the number of rows
nor on how work is divided, and rows need no padding. Only the number of rows that share a pass over the weights
varies: a *tile* of up to six rows, or twelve with AVX-512, keeps its sums in registers while it reads a panel.

For more rows than two tiles a panel is first unpacked to float32 (the same values), part by part, so that the part
stays in the cache while all tiles read it.
"""

# numba's annotations cover neither its intrinsics nor the types in compiled code.
# mypy: disable-error-code="no-untyped-call, arg-type, call-arg, attr-defined, no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shared.kernels.formats import FORMATS, PANEL, SCALE_BLOCK
from shared.kernels.layout import PART
from shared.kernels.native import vector_lanes
from shared.kernels.source.vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    constant,
    fma,
    from_bits,
    get_float,
    get_uint8,
    get_uint16,
    kernel,
    load,
    loop,
    multiply_add,
    prefetch,
    put_float,
    repeated,
    store,
)

HALF: Final = PANEL // 2
LINE: Final = 64
"""Bytes of a line of the cache."""

# Registers are as wide as the CPU that the code is compiled for has them. The bits are the same with every width.
WIDTH: Final = vector_lanes()
TILE_ROWS: Final = 12 if WIDTH == HALF else 6
"""Most rows of a tile: AVX-512 has 32 registers, each as wide as half a panel, other CPUs 16 or narrower ones."""
UNPACK_ROWS: Final = 2 * TILE_ROWS
"""More rows than this are multiplied with unpacked panels."""


class _Operand:
    """Emits code that reads the weights of some outputs: i to i + WIDTH of a panel, and i + 16 to i + 16 + WIDTH."""

    floats = ir.VectorType(F32, WIDTH)
    ints = ir.VectorType(I32, WIDTH)

    def __init__(self, form: str, first: int) -> None:
        self.form, self.first = form, first

    def scales(self, b: Any, block: Any) -> list[list[Any]]:
        """Return scale, and minimum in int4, of both halves for the block at an address."""
        parts = {"int8": 1, "int4": 2}.get(self.form, 0)
        return [
            [
                self._half_float(b, b.add(block, constant(I64, 64 * part + 2 * half + 2 * self.first)))
                for part in range(parts)
            ]
            for half in (0, HALF)
        ]

    def weights(self, b: Any, row: Any, scales: list[list[Any]]) -> list[Any]:
        """Return the weights of both halves for the input at an address."""
        floats, ints = self.floats, self.ints

        def there(size: int, half: int = 0) -> Any:
            return b.add(row, constant(I64, size * (self.first + half)))

        if self.form == "float32":
            return [load(b, there(4, half), floats) for half in (0, HALF)]
        if self.form == "bfloat16":
            words = load(b, there(4), ints)
            low, high = b.shl(words, constant(ints, 16)), b.and_(words, constant(ints, 0xFFFF0000))
            return [b.bitcast(low, floats), b.bitcast(high, floats)]
        small = ir.VectorType(I8, WIDTH)
        if self.form == "int8":
            quanta = [b.sext(load(b, there(1, half), small), ints) for half in (0, HALF)]
            return [b.fmul(b.sitofp(q, floats), d) for q, (d,) in zip(quanta, scales, strict=True)]
        both = b.zext(load(b, there(1), small), ints)
        quanta = [b.and_(both, constant(ints, 15)), b.lshr(both, constant(ints, 4))]
        return [multiply_add(b, b.sitofp(q, floats), d, m) for q, (d, m) in zip(quanta, scales, strict=True)]

    def _half_float(self, b: Any, address: Any) -> Any:
        """Return float16 values as float32, subnormals included; not infinities or NaN."""
        bits = b.zext(load(b, address, ir.VectorType(I16, WIDTH)), self.ints)
        magnitude = b.shl(b.and_(bits, constant(self.ints, 0x7FFF)), constant(self.ints, 13))
        scaled = b.fmul(b.bitcast(magnitude, self.floats), constant(self.floats, 2.0**112))
        sign = b.shl(b.and_(bits, constant(self.ints, 0x8000)), constant(self.ints, 16))
        return b.bitcast(b.or_(b.bitcast(scaled, self.ints), sign), self.floats)


def _over_inputs(
    b: Any,
    form: str,
    depth: Any,
    operands: Sequence[tuple[Any, _Operand]],
    carried: list[Any],
    step: Any,
    ahead: tuple[Any, int, int] | None = None,
) -> list[Any]:
    """Emit a loop over all inputs. operands: pairs of a panel's address and what to read of it. `step(input, weights,
    carried)` gets the input's number and all operands' weights, and returns the carried values' next ones.

    ahead: address of the panel that is read next, the number of this pass over the weights and the number of passes.
    Each pass loads its share of that panel into the cache, so that memory and arithmetic work at the same time.
    """
    size = FORMATS[form]
    inner = 4  # inputs per turn: a multiple of it divides SCALE_BLOCK

    def turn(first: Any, rows: Sequence[Any], scales: Sequence[Any], values: list[Any]) -> list[Any]:
        for i in range(inner):
            weights = [
                operand.weights(b, b.add(row, constant(I64, i * size.input_bytes)), s)
                for row, (_, operand), s in zip(rows, operands, scales, strict=True)
            ]
            values = step(b.add(first, constant(I64, i)), weights, values)
        return values

    def blocks(number: Any, values: list[Any]) -> list[Any]:
        start = b.mul(number, constant(I64, size.panel_bytes(SCALE_BLOCK)))
        tops = [b.add(panel, start) for panel, _ in operands]
        scales = [operand.scales(b, top) for top, (_, operand) in zip(tops, operands, strict=True)]
        bottoms = [b.add(top, constant(I64, size.scale_bytes)) for top in tops]

        def turns(k: Any, values: list[Any]) -> list[Any]:
            offset = b.mul(k, constant(I64, inner * size.input_bytes))
            first = b.add(b.mul(number, constant(I64, SCALE_BLOCK)), b.mul(k, constant(I64, inner)))
            if ahead is not None:
                panel, mine, passes = ahead
                there = b.add(b.add(panel, start), b.add(offset, constant(I64, size.scale_bytes)))
                for line in range(mine * LINE, max(inner * size.input_bytes, passes * LINE), passes * LINE):
                    prefetch(b, b.add(there, constant(I64, min(line, inner * size.input_bytes - 1))))
            return turn(first, [b.add(bottom, offset) for bottom in bottoms], scales, values)

        return loop(b, constant(I64, SCALE_BLOCK // inner), values, turns)

    return loop(b, b.sdiv(depth, constant(I64, SCALE_BLOCK)), carried, blocks)


def _emit_tile(b: Any, form: str, rows: int, panels: int, args: Sequence[Any]) -> None:
    """Emit `out += a @ weights`. args: as those of `_row` and `_tile` after its number of rows."""
    a, a_stride, weights, panel_bytes, depth, out, stride = args
    groups = [(panel, first) for panel in range(panels) for first in range(0, HALF, WIDTH)]
    # All sums of a pass must fit the registers.
    at_once = len(groups) if rows <= 2 else 1
    a_rows = [b.add(a, b.mul(a_stride, constant(I64, r))) for r in range(rows)]
    floats = _Operand.floats
    for begin in range(0, len(groups), at_once):
        chosen = groups[begin : begin + at_once]
        operands = [
            (b.add(weights, b.mul(panel_bytes, constant(I64, panel))), _Operand(form, first)) for panel, first in chosen
        ]
        places = [
            b.add(b.add(out, b.mul(stride, constant(I64, r))), constant(I64, 4 * (panel * PANEL + first + half)))
            for r in range(rows)
            for panel, first in chosen
            for half in (0, HALF)
        ]

        def step(k: Any, read: list[Any], sums: list[Any]) -> list[Any]:
            flat = [w for pair in read for w in pair]
            following = []
            for r in range(rows):
                x = repeated(b, load(b, b.add(a_rows[r], b.mul(k, constant(I64, 4))), F32), WIDTH)
                mine = sums[r * len(flat) : (r + 1) * len(flat)]
                following += [multiply_add(b, x, w, s) for w, s in zip(flat, mine, strict=True)]
            return following

        following_panel = b.add(weights, b.mul(panel_bytes, constant(I64, panels)))
        ahead = (following_panel, begin // at_once, len(groups) // at_once)
        sums = _over_inputs(b, form, depth, operands, [load(b, p, floats) for p in places], step, ahead)
        for value, place in zip(sums, places, strict=True):
            store(b, value, place)


def _row(form: str) -> Any:
    """Return an intrinsic for `out += a @ weights` with one row.

    Its arguments: addresses of a (1, depth) float32, of two panels, and of out (1, 64) float32; strides of a and out in
    bytes; the size of a panel; the depth, a multiple of `SCALE_BLOCK`.
    """

    @intrinsic
    def row(
        typingctx: Any, a: Any, a_stride: Any, weights: Any, panel_bytes: Any, depth: Any, out: Any, stride: Any
    ) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            _emit_tile(b, form, 1, 2, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), emit

    return row


def _tile(form: str) -> Any:
    """Return an intrinsic for `out += a @ weights` with one panel. Its first argument is the number of rows, 2 to
    TILE_ROWS; the others are those of `_row`."""

    @intrinsic
    def tile(
        typingctx: Any,
        rows: Any,
        a: Any,
        a_stride: Any,
        weights: Any,
        panel_bytes: Any,
        depth: Any,
        out: Any,
        stride: Any,
    ) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            count, *others = args
            cases = {rows: b.append_basic_block() for rows in range(2, TILE_ROWS + 1)}
            after = b.append_basic_block()
            chosen = b.switch(count, cases[TILE_ROWS])
            for rows, case in cases.items():
                chosen.add_case(constant(I64, rows), case)
                b.position_at_end(case)
                _emit_tile(b, form, rows, 1, others)
                b.branch(after)
            b.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return tile


def _unpack(form: str) -> Any:
    """Return an intrinsic that writes a panel's weights as float32: addresses of panel and out; the depth."""
    groups = [_Operand(form, first) for first in range(0, HALF, WIDTH)]

    @intrinsic
    def unpack(typingctx: Any, panel: Any, out: Any, depth: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            panel, out, depth = args

            def step(k: Any, read: list[Any], carried: list[Any]) -> list[Any]:
                row = b.add(out, b.mul(k, constant(I64, 4 * PANEL)))
                for operand, pair in zip(groups, read, strict=True):
                    for half, value in zip((0, HALF), pair, strict=True):
                        store(b, value, b.add(row, constant(I64, 4 * (operand.first + half))))
                return carried

            _over_inputs(b, form, depth, [(panel, operand) for operand in groups], [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), emit

    return unpack


def _tiles(form: str) -> Callable[..., None]:
    """Return the function that multiplies two rows or more with one panel, tile by tile."""
    tile = _tile(form)

    @kernel
    def tiles(rows: int, a: int, a_stride: int, panel: int, ahead: int, depth: int, out: int, stride: int) -> None:
        count = (rows + TILE_ROWS - 1) // TILE_ROWS
        for i in range(count):
            # As even as possible, so that no tile is small.
            some = (rows + count - i - 1) // (count - i)
            tile(some, a, a_stride, panel, ahead, depth, out, stride)
            rows -= some
            a += some * a_stride
            out += some * stride

    return tiles


_float32_row, _bfloat16_row, _int8_row, _int4_row = map(_row, FORMATS)
_float32_tiles, _bfloat16_tiles, _int8_tiles, _int4_tiles = map(_tiles, FORMATS)
_unpack_bfloat16, _unpack_int8, _unpack_int4 = map(_unpack, [form for form in FORMATS if form != "float32"])
_FLOAT32, _BFLOAT16, _INT8, _INT4 = (form.number for form in FORMATS.values())


@kernel
def add_product(
    form: int,
    rows: int,
    a: int,
    a_stride: int,
    weights: int,
    panel_bytes: int,
    depth: int,
    out: int,
    stride: int,
    unpacked: int,
) -> None:
    """Add the product of float32 rows and a pair of panels: out (rows, 64) += a (rows, depth) @ panels.

    form: number of the weights' format. Addresses; strides and panel_bytes in bytes. unpacked: a buffer of
    `UNPACKED_FLOATS`.
    """
    if rows == 1:
        if form == _FLOAT32:
            _float32_row(a, a_stride, weights, panel_bytes, depth, out, stride)
        elif form == _BFLOAT16:
            _bfloat16_row(a, a_stride, weights, panel_bytes, depth, out, stride)
        elif form == _INT8:
            _int8_row(a, a_stride, weights, panel_bytes, depth, out, stride)
        else:
            _int4_row(a, a_stride, weights, panel_bytes, depth, out, stride)
        return
    for n in range(2):
        panel = weights + n * panel_bytes
        target = out + n * PANEL * 4
        if rows > UNPACK_ROWS or form == _FLOAT32:
            block_bytes = panel_bytes // (depth // SCALE_BLOCK)
            for first in range(0, depth, PART):
                part = min(PART, depth - first)
                source = panel + first // SCALE_BLOCK * block_bytes
                if form == _FLOAT32:
                    _float32_tiles(rows, a + first * 4, a_stride, source, panel_bytes, part, target, stride)
                    continue
                if form == _BFLOAT16:
                    _unpack_bfloat16(source, unpacked, part)
                elif form == _INT8:
                    _unpack_int8(source, unpacked, part)
                else:
                    _unpack_int4(source, unpacked, part)
                _float32_tiles(rows, a + first * 4, a_stride, unpacked, 0, part, target, stride)
        elif form == _BFLOAT16:
            _bfloat16_tiles(rows, a, a_stride, panel, panel_bytes, depth, target, stride)
        elif form == _INT8:
            _int8_tiles(rows, a, a_stride, panel, panel_bytes, depth, target, stride)
        else:
            _int4_tiles(rows, a, a_stride, panel, panel_bytes, depth, target, stride)


@kernel
def clear(rows: int, out: int, stride: int) -> None:
    """Set 64 floats of each row to 0."""
    for r in range(rows):
        for n in range(2 * PANEL):
            put_float(out + r * stride, n, np.float32(0))


@kernel
def _half_float(bits: int) -> float:
    magnitude = from_bits(np.int32((bits & 0x7FFF) << 13)) * np.float32(2.0**112)
    return -magnitude if bits & 0x8000 else magnitude


@kernel
def weight(form: int, weights: int, panel_bytes: int, output: int, input: int) -> float:
    """Return one weight of a packed matrix, as float32: the same value that products use."""
    panel, lane = weights + output // PANEL * panel_bytes, output % PANEL
    half, byte = lane // HALF, lane % HALF
    if form == _FLOAT32:
        return get_float(panel, input * PANEL + lane)
    if form == _BFLOAT16:
        return from_bits(np.int32(get_uint16(panel, (input * HALF + byte) * 2 + half)) << np.int32(16))
    block, row = input // SCALE_BLOCK, input % SCALE_BLOCK
    if form == _INT8:
        at = panel + block * (2 * PANEL + SCALE_BLOCK * PANEL)
        quantum = np.int32(get_uint8(at, 2 * PANEL + row * PANEL + lane))
        quantum = quantum - 256 if quantum > 127 else quantum
        return np.float32(quantum) * _half_float(get_uint16(at, lane))
    at = panel + block * (4 * PANEL + SCALE_BLOCK * HALF)
    quantum = np.int32(get_uint8(at, 4 * PANEL + row * HALF + byte)) >> np.int32(4 * half) & np.int32(15)
    return fma(np.float32(quantum), _half_float(get_uint16(at, lane)), _half_float(get_uint16(at, PANEL + lane)))
