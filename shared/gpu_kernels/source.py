"""The kernels, in Triton.

A row's results depend on the row, the weights and the KV of its session alone. By construction:

- A tile has constant sizes. A program computes whole tiles: rows that fill one up are computed and never read.
- A sum has one order. Products walk the inputs from first to last in one program, without split-K. Attention walks the
  keys in tiles of `TILE` tokens from position 0, and joins runs of `SPLIT` tokens in order.
- No argument that depends on the batch is specialized: one compiled kernel serves every number of rows.
- Float32 products never take TF32, and multiplications are not contracted with additions (`launches.OPTIONS`), so that
  the same expression has the same bits in two kernels.

Sums, norms and the softmax are float32. Operands of products have the weights' format, those of attention the KV's.

Triton's interpreter (TRITON_INTERPRET=1) differs from a GPU in three ways, so that some steps are written a second time
for it. It has no products of bfloat16. It rounds to bfloat16 wrongly where the mantissa carries into the exponent. And
its products are those of numpy's BLAS, whose bits depend on the place of a row in a tile, which tensor cores' do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(64)
"""Tokens of a block of the KV cache, and keys per step of attention."""
SPLIT = tl.constexpr(256)
"""Tokens of a run, whose softmax is computed on its own and joined to those of the runs before it."""
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _narrowed(values, pointer):
    """Round float32 values to the type of a pointer's elements."""
    element: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and element == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = nearest.to(tl.float32, bitcast=True)
    return values.to(element)


@triton.jit
def _product(left, right):
    """Return the product of two tiles, with sums in float32."""
    if INTERPRETED:
        return tl.sum(left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :], axis=1)
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _product_after(left, right, sums):
    """Return sums + the product of two tiles."""
    if INTERPRETED:
        return sums + _product(left, right)
    else:
        return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def _inverse_root_mean_square(x, SIZE: tl.constexpr, EPS: tl.constexpr):
    """Return 1 / sqrt(mean(x^2) + eps) of a row, whose elements beyond the size are zero."""
    return 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / SIZE + EPS)


@triton.jit
def embed(
    x, tokens, embedding,
    SIZE: tl.constexpr, X_STRIDE: tl.constexpr, EMBEDDING_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """x = multiplier * the embedding of each row's token. Grid: rows."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    token = tl.load(tokens + row).to(tl.int64)
    values = tl.load(embedding + token * EMBEDDING_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row * X_STRIDE + column, values * MULTIPLIER, mask=inside)


@triton.jit
def add_and_norm(
    x, added, post_gain, gain, normed, states,
    SIZE: tl.constexpr, X_STRIDE: tl.constexpr, ADDED_STRIDE: tl.constexpr, NORMED_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, ADDS: tl.constexpr, POST_NORMS: tl.constexpr, NORMS: tl.constexpr, KEEPS: tl.constexpr,
    MULTIPLIER: tl.constexpr, POST_EPS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """x += multiplier * post-norm(added); normed = norm(x), in the format of operands. Grid: rows.

    KEEPS: write the norm in float32 too, into `states`.
    """
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    value = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0)
    if ADDS:
        more = tl.load(added + row * ADDED_STRIDE + column, mask=inside, other=0.0)
        if POST_NORMS:
            more *= _inverse_root_mean_square(more, SIZE, POST_EPS)
            more *= tl.load(post_gain + column, mask=inside, other=0.0)
        value += MULTIPLIER * more
        tl.store(x + row * X_STRIDE + column, value, mask=inside)
    if NORMS:
        value *= _inverse_root_mean_square(value, SIZE, EPS)
        value *= tl.load(gain + column, mask=inside, other=0.0)
    tl.store(normed + row * NORMED_STRIDE + column, _narrowed(value, normed), mask=inside)
    if KEEPS:
        tl.store(states + row * SIZE + column, value, mask=inside)


@triton.jit
def multiply(
    x, weight, bias, chosen, out,
    DEPTH: tl.constexpr, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHOOSES: tl.constexpr, MULTIPLIER: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = multiplier * (x @ weight^T + bias), capped, in float32. Grid: tiles of rows, tiles of outputs.

    weight: (outputs, DEPTH). CHOOSES: the i-th row of `out` is computed from row chosen[i] of x.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = row
    if CHOOSES:
        source = tl.load(chosen + row)
    depth = tl.arange(0, BLOCK_K)
    left = x + source[:, None].to(tl.int64) * X_STRIDE + depth[None, :]
    right = weight + output[None, :].to(tl.int64) * DEPTH + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        sums = _product_after(tl.load(left + first), tl.load(right + first), sums)
    if HAS_BIAS:
        sums += tl.load(bias + output)[None, :]
    sums *= MULTIPLIER
    if SOFTCAP != 0.0:
        sums = SOFTCAP * _tanh(sums / SOFTCAP)
    tl.store(out + row[:, None].to(tl.int64) * OUT_STRIDE + output[None, :], sums)


@triton.jit
def multiply_gated(
    x, gate, up, gate_bias, up_bias, out,
    DEPTH: tl.constexpr, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = activation(x @ gate^T + bias) * (x @ up^T + bias), in the format of operands. Grid: as `multiply`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + row[:, None].to(tl.int64) * X_STRIDE + depth[None, :]
    right = output[None, :].to(tl.int64) * DEPTH + depth[:, None]
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        rows = tl.load(left + first)
        gates = _product_after(rows, tl.load(gate + right + first), gates)
        ups = _product_after(rows, tl.load(up + right + first), ups)
    if HAS_BIAS:
        gates += tl.load(gate_bias + output)[None, :]
        ups += tl.load(up_bias + output)[None, :]
    values = _activated(gates, ACTIVATION) * ups
    tl.store(out + row[:, None].to(tl.int64) * OUT_STRIDE + output[None, :], _narrowed(values, out))


@triton.jit
def _rotated(
    rows, first, gain, cosines, sines,
    HEADS: tl.constexpr, HEADS_WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    NORMS: tl.constexpr, WHOLE: tl.constexpr, EPS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Return a token's heads from `first` on, normed and rotated: (heads' width, head's width)."""
    head = tl.arange(0, HEADS_WIDTH)[:, None]
    place = tl.arange(0, HEAD_WIDTH)[None, :]
    inside = (head < HEADS) & (place < HEAD_SIZE)
    partner = tl.where(place < PAIRS, place + PAIRS, place - PAIRS)
    paired = inside & (place < 2 * PAIRS)
    column = head * HEAD_SIZE
    value = tl.load(rows + first + column + place, mask=inside, other=0.0)
    other = tl.load(rows + first + column + partner, mask=paired, other=0.0)
    if NORMS:
        squares = tl.sum(value * value, axis=1)
        if WHOLE:
            factor = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (HEADS * HEAD_SIZE) + EPS)
            value *= factor
            other *= factor
        else:
            factors = 1.0 / tl.sqrt(squares / HEAD_SIZE + EPS)
            value *= factors[:, None]
            other *= factors[:, None]
            column = head * 0
        value *= tl.load(gain + column + place, mask=inside, other=0.0)
        other *= tl.load(gain + column + partner, mask=paired, other=0.0)
    if PAIRS > 0:
        pair = tl.where(place < PAIRS, place, place - PAIRS)
        rotates = place < 2 * PAIRS
        cosine = tl.load(cosines + pair, mask=rotates, other=1.0)
        sine = tl.load(sines + pair, mask=rotates, other=0.0)
        value = value * cosine + tl.where(place < PAIRS, -other, other) * sine
    return value


@triton.jit
def rotate_and_store(
    qkv, positions, slots, q_gain, k_gain, cosines, sines, q, keys, values,
    QKV_STRIDE: tl.constexpr, Q_STRIDE: tl.constexpr, HEADS: tl.constexpr, HEADS_WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr, KV_WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    NORMS_Q: tl.constexpr, NORMS_K: tl.constexpr, WHOLE: tl.constexpr, Q_EPS: tl.constexpr, K_EPS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate each row's q and k; write q, and the row's keys and values to its slot. Grid: rows.

    keys, values: (blocks, KV heads, TILE, head size). A slot is block * TILE + place in the block; that of a row that
    fills up a graph is negative, and nothing is written.
    """
    row = tl.program_id(0)
    rows = qkv + row * QKV_STRIDE
    position = tl.load(positions + row).to(tl.int64)
    cosines += position * PAIRS
    sines += position * PAIRS
    place = tl.arange(0, HEAD_WIDTH)[None, :]
    head = tl.arange(0, HEADS_WIDTH)[:, None]
    query = _rotated(
        rows, 0, q_gain, cosines, sines, HEADS, HEADS_WIDTH, HEAD_SIZE, HEAD_WIDTH, NORMS_Q, WHOLE, Q_EPS, PAIRS
    )
    inside = (head < HEADS) & (place < HEAD_SIZE)
    tl.store(q + row * Q_STRIDE + head * HEAD_SIZE + place, _narrowed(query, q), mask=inside)
    key = _rotated(
        rows, HEADS * HEAD_SIZE, k_gain, cosines, sines,
        KV_HEADS, KV_WIDTH, HEAD_SIZE, HEAD_WIDTH, NORMS_K, WHOLE, K_EPS, PAIRS,
    )  # fmt: skip
    kv_head = tl.arange(0, KV_WIDTH)[:, None]
    held = (kv_head < KV_HEADS) & (place < HEAD_SIZE)
    value = tl.load(rows + (HEADS + KV_HEADS + kv_head) * HEAD_SIZE + place, mask=held, other=0.0)
    slot = tl.load(slots + row).to(tl.int64)
    target = ((slot // TILE * KV_HEADS + kv_head) * TILE + slot % TILE) * HEAD_SIZE + place
    tl.store(keys + target, _narrowed(key, keys), mask=held & (slot >= 0))
    tl.store(values + target, _narrowed(value, values), mask=held & (slot >= 0))


@triton.jit
def _joined(most, total, mixed, run_most, run_total, run_mixed):
    """Join the softmax of a run to that of the runs before it. One without a visible key changes no bit."""
    new_most = tl.maximum(most, run_most)
    shift = tl.where(new_most == float("-inf"), 0.0, new_most)
    kept = tl.exp2(most - shift)
    added = tl.exp2(run_most - shift)
    total = total * kept + run_total * added
    mixed = mixed * kept[:, None] + run_mixed * added[:, None]
    return new_most, total, mixed


@triton.jit(do_not_specialize=["runs_each", "run_stride", "direct"])
def attend(
    q, keys, values, spans, tables, out, run_mixed, run_sums, runs_each, run_stride, direct,
    Q_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_WIDTH: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Causal attention of spans: new tokens of one session, at most BLOCK_M // GROUP. Grid: spans, KV heads, parts.

    A span is its first row, first position, number of tokens (0 for one that fills up a graph), and the place of its
    session's first block in `tables`. A part is `runs_each` runs of keys. `direct`: there is one part, and the result
    is written to `out`; else each run's softmax is written for `join`. Both ways have the same bits.
    """
    span = spans + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.load(span)
    position = tl.load(span + 1)
    count = tl.load(span + 2)
    table = tables + tl.load(span + 3)
    lane = tl.arange(0, BLOCK_M)
    token = lane // GROUP
    row = (first_row + token).to(tl.int64)
    head = kv_head * GROUP + lane % GROUP
    place = tl.arange(0, HEAD_WIDTH)
    inside = (token < count)[:, None] & (place < HEAD_SIZE)[None, :]
    query = tl.load(q + row[:, None] * Q_STRIDE + head[:, None] * HEAD_SIZE + place[None, :], mask=inside, other=0.0)
    own = position + token
    last = position + count - 1
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(position - WINDOW + 1, 0)
    first_run = tl.maximum(lowest // SPLIT, tl.program_id(2) * runs_each)
    end_run = tl.minimum(last // SPLIT + 1, (tl.program_id(2) + 1) * runs_each)
    if count == 0:
        end_run = first_run
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, HEAD_WIDTH), tl.float32)
    step = tl.arange(0, TILE)
    for run in range(first_run, end_run):
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        mix = tl.zeros((BLOCK_M, HEAD_WIDTH), tl.float32)
        for start in range(
            tl.maximum(run * SPLIT, lowest // TILE * TILE), tl.minimum(run * SPLIT + SPLIT, last + 1), TILE
        ):
            block = tl.load(table + start // TILE).to(tl.int64)
            base = (block * KV_HEADS + kv_head) * (TILE * HEAD_SIZE)
            at = start + step
            key = tl.load(
                keys + base + step[None, :] * HEAD_SIZE + place[:, None],
                mask=(at <= last)[None, :] & (place < HEAD_SIZE)[:, None], other=0.0,
            )  # fmt: skip
            scores = _product(query, key) * SCALE
            if SOFTCAP != 0.0:
                scores = SOFTCAP * _tanh(scores / SOFTCAP)
            seen = at[None, :] <= own[:, None]
            sees = start <= own
            if WINDOW > 0:
                seen = seen & (at[None, :] > own[:, None] - WINDOW)
                sees = sees & (start + TILE > own - WINDOW + 1)
            scores = tl.where(seen, scores * LOG2_E, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - shift[:, None])
            kept = tl.exp2(top - shift)
            value = tl.load(
                values + base + step[:, None] * HEAD_SIZE + place[None, :],
                mask=(at <= last)[:, None] & (place < HEAD_SIZE)[None, :], other=0.0,
            )  # fmt: skip
            new_mix = mix * kept[:, None] + _product(_narrowed(weights, values), value)
            # A tile that a row does not see leaves the row's state as it is.
            mix = tl.where(sees[:, None], new_mix, mix)
            sums = tl.where(sees, sums * kept + tl.sum(weights, axis=1), sums)
            top = tl.where(sees, new_top, top)
        if direct != 0:
            most, total, mixed = _joined(most, total, mixed, top, sums, mix)
        else:
            index = (row * (KV_HEADS * GROUP) + head) * run_stride + run
            tl.store(run_mixed + index[:, None] * HEAD_SIZE + place[None, :], mix, mask=inside)
            tl.store(run_sums + 2 * index, top, mask=token < count)
            tl.store(run_sums + 2 * index + 1, sums, mask=token < count)
    if (direct != 0) & (count > 0):
        result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        target = out + row[:, None] * OUT_STRIDE + head[:, None] * HEAD_SIZE + place[None, :]
        tl.store(target, _narrowed(result, out), mask=inside)


@triton.jit(do_not_specialize=["run_stride"])
def join(
    positions, out, run_mixed, run_sums, run_stride,
    OUT_STRIDE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_WIDTH: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Join each row's runs in order and write the result of attention. Grid: rows, KV heads."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    member = tl.arange(0, GROUP_WIDTH)
    head = tl.program_id(1) * GROUP + member
    place = tl.arange(0, HEAD_WIDTH)
    inside = (member < GROUP)[:, None] & (place < HEAD_SIZE)[None, :]
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(position - WINDOW + 1, 0)
    most = tl.full((GROUP_WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_WIDTH,), tl.float32)
    mixed = tl.zeros((GROUP_WIDTH, HEAD_WIDTH), tl.float32)
    for run in range(lowest // SPLIT, position // SPLIT + 1):
        index = (row * (KV_HEADS * GROUP) + head) * run_stride + run
        top = tl.load(run_sums + 2 * index, mask=member < GROUP, other=float("-inf"))
        sums = tl.load(run_sums + 2 * index + 1, mask=member < GROUP, other=0.0)
        mix = tl.load(run_mixed + index[:, None] * HEAD_SIZE + place[None, :], mask=inside, other=0.0)
        most, total, mixed = _joined(most, total, mixed, top, sums, mix)
    result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out + row * OUT_STRIDE + head[:, None] * HEAD_SIZE + place[None, :]
    tl.store(target, _narrowed(result, out), mask=inside)
