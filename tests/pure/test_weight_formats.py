"""Packed weights are those of the matrix, in the layout that the formats' documentation describes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.kernels.formats import PANEL, SCALE_BLOCK, Blocks, Packed, pack, quantized
from shared.kernels.weights import dense

SHAPES = [(1, 1), (64, 32), (65, 33), (100, 1100)]

Floats = NDArray[np.float32]


def matrix(outputs: int, inputs: int) -> Floats:
    return np.random.default_rng(outputs).standard_normal((outputs, inputs)).astype(np.float32)


def blocks_of_four_bits(outputs: int, inputs: int) -> Blocks:
    random = np.random.default_rng(inputs)
    scales, minima = random.standard_normal((2, outputs, inputs // SCALE_BLOCK)).astype(np.float16)
    return Blocks(random.integers(0, 16, (outputs, inputs)).astype(np.int8), scales, minima)


def unpacked(packed: Packed) -> Floats:
    """Read the panels as the documentation of the formats describes them, padding included."""
    panels, depth = packed.padded_outputs // PANEL, packed.padded_inputs
    data = packed.data.reshape(panels, packed.panel_bytes)
    if packed.format == "float32":
        values = data.view(np.float32).reshape(panels, depth, PANEL)
    elif packed.format == "bfloat16":
        words = data.view(np.uint32).reshape(panels, depth, PANEL // 2)
        values = np.concatenate([words << 16, words & np.uint32(0xFFFF0000)], axis=-1).view(np.float32)
    else:
        blocks = data.reshape(panels, depth // SCALE_BLOCK, -1)
        heads = 1 if packed.format == "int8" else 2
        factors = blocks[..., : 64 * heads].copy().view(np.float16).astype(np.float32)  # (panels, blocks, heads * 32)
        rows = blocks[..., 64 * heads :].reshape(panels, depth // SCALE_BLOCK, SCALE_BLOCK, -1)
        quanta = rows.view(np.int8) if heads == 1 else np.concatenate([rows & 15, rows >> 4], axis=-1)
        values = quanta.astype(np.float32) * factors[:, :, None, :PANEL]
        if heads == 2:
            values = values + factors[:, :, None, PANEL:]
        values = values.reshape(panels, depth, PANEL)
    return values.swapaxes(1, 2).reshape(packed.padded_outputs, depth)


def check(packed: Packed, weight: Floats) -> None:
    outputs, inputs = weight.shape
    assert (packed.outputs, packed.inputs) == (outputs, inputs)
    values = unpacked(packed)
    assert np.array_equal(values[:outputs, :inputs], weight)
    values[:outputs, :inputs] = 0
    assert not values.any(), "padding is zero"


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_and_bfloat16_hold_each_weight(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    check(pack(weight, "float32"), weight)
    rounded = torch.from_numpy(weight).bfloat16()
    check(pack(weight, "bfloat16"), rounded.float().numpy())
    bits = rounded.view(torch.uint16).numpy()
    assert np.array_equal(pack(bits, "bfloat16").data, pack(weight, "bfloat16").data)
    check(pack(bits, "float32"), rounded.float().numpy())


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even() -> None:
    bits = [0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F817FFF, 0x00000001, 0x80000000, 0x7F7FFFFF, 0xFF800000]
    weight = np.array([bits], np.uint32).view(np.float32)
    expected = torch.from_numpy(weight.copy()).bfloat16().view(torch.uint16).numpy()
    words = pack(weight, "bfloat16").data.view(np.uint16)
    assert np.array_equal(words.reshape(2, SCALE_BLOCK, PANEL)[0, : len(bits), 0], expected[0])
    assert expected[0, 1] == 0x3F80, "the even neighbour is below"
    assert expected[0, 3] == 0x3F82, "the even neighbour is above"


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_holds_integers_and_a_scale_per_block(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    values = dense(quantized(weight))[:, : shape[1]]
    check(pack(weight, "int8"), values)
    largest = np.abs(weight).max()
    assert np.abs(values - weight).max() <= largest / 127 * 0.51
    assert np.abs(quantized(weight).quanta).max() == 127


def test_blocks_keep_their_integers() -> None:
    eight = quantized(matrix(70, 96))
    check(pack(eight, "int8"), dense(eight))
    four = blocks_of_four_bits(70, 96)
    check(pack(four, "int4"), dense(four))


def test_a_block_of_zeros_or_of_tiny_weights_is_finite() -> None:
    weight = matrix(3, 64)
    weight[0] = 0
    weight[1] = 1e-30
    weight[2] *= 1e-5  # its scale is a subnormal float16
    check(pack(weight, "int8"), dense(quantized(weight)))
    assert np.isfinite(dense(quantized(weight))).all()
    assert not dense(quantized(weight))[:2].any()
    assert dense(quantized(weight))[2].any()


@pytest.mark.parametrize(
    ("weight", "form", "reason"),
    [
        (matrix(4, 32), "int4", "a matrix without blocks can't be packed as int4"),
        (quantized(matrix(4, 32)), "int4", "blocks of int8 can't be packed as int4"),
        (blocks_of_four_bits(4, 32), "int8", "blocks of int4 can't be packed as int8"),
        (quantized(matrix(4, 32)), "float32", "blocks of int8 can't be packed as float32"),
        (Blocks(np.zeros((4, 33), np.int8), np.zeros((4, 1), np.float16)), "int8", "33 inputs are no whole blocks"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(weight: Floats | Blocks, form: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack(weight, form)
