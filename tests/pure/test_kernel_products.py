"""Compiled products: weights of every format, and bits that depend on neither the number of rows nor the threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.kernels import native, team
from shared.kernels.cache import float_bits
from shared.kernels.formats import FORMATS, SCALE_BLOCK, Blocks, Packed, pack, quantized
from shared.kernels.layout import FUNCTIONS, PART, PASS_WORDS, UNPACKED_FLOATS, JobWord, PassWord, ProductWord
from shared.kernels.weights import Product, dense

Floats = NDArray[np.float32]

MOST_ROWS = 40
OUTPUTS, INPUTS = 100, PART + 76
"""Neither whole panels nor whole blocks; more inputs than are unpacked at once."""


def packed(form: str) -> tuple[Packed, Floats]:
    """Return a random matrix in a format, and its weights. The scales of some blocks are subnormal in float16."""
    random = np.random.default_rng(7)
    if form == "int4":
        blocks = INPUTS // SCALE_BLOCK
        quanta = random.integers(0, 16, (OUTPUTS, blocks * SCALE_BLOCK)).astype(np.int8)
        scales, minima = (random.standard_normal((2, OUTPUTS, blocks)) * 0.2).astype(np.float16)
        scales[:, 1] = np.float16(1e-6)
        factor, minimum = (np.repeat(part.astype(np.float64), SCALE_BLOCK, axis=1) for part in (scales, minima))
        return pack(Blocks(quanta, scales, minima), form), (quanta * factor + minimum).astype(np.float32)
    weight = random.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
    weight[:, SCALE_BLOCK : 2 * SCALE_BLOCK] *= np.float32(1e-5)
    expected = {
        "float32": lambda: weight,
        "bfloat16": lambda: torch.from_numpy(weight).bfloat16().float().numpy(),
        "int8": lambda: dense(quantized(weight))[:, :INPUTS],
    }
    return pack(weight, form), expected[form]()


def random_rows(count: int, inputs: int) -> Floats:
    return np.random.default_rng(1).standard_normal((count, inputs)).astype(np.float32)


def multiply(matrix: Packed, rows: Floats, *, threads: int = 1, bias: Floats | None = None) -> Floats:
    """Return the product of rows (rows, inputs), computed by compiled code with this many threads."""
    product = Product(matrix, bias)
    x = np.zeros((len(rows), matrix.padded_inputs), np.float32)
    x[:, : matrix.inputs] = rows
    y = np.full((len(rows), matrix.padded_outputs), np.nan, np.float32)
    scratch = np.zeros((threads, UNPACKED_FLOATS), np.float32)
    job, counters = team.job_words(PASS_WORDS, 1)
    job[JobWord.FUNCTION] = FUNCTIONS.index("multiply_rows")
    for word, value in (
        (PassWord.ROWS, len(rows)),
        (PassWord.X, x.ctypes.data),
        (PassWord.HIDDEN_STRIDE, matrix.padded_inputs),
        (PassWord.LOGITS, y.ctypes.data),
        (PassWord.LOGITS_STRIDE, matrix.padded_outputs),
        (PassWord.LOGIT_MULTIPLIER, float_bits(1.0)),
        (PassWord.SCRATCH, scratch.ctypes.data),
        (PassWord.SCRATCH_BYTES, scratch.strides[0]),
    ):
        job[word] = value
    job[PassWord.HEAD : PassWord.HEAD + len(ProductWord)] = product.words()
    team.run(native.load(), job, counters, threads)
    assert job[JobWord.SEATS] == threads, "all threads take part"
    assert counters[0] == matrix.padded_outputs // 64 + threads, "each thread draws tickets until none is left"
    return y[:, : matrix.outputs]


@pytest.fixture(autouse=True)
def _runtime() -> None:
    """Threads are those of torch's OpenMP runtime."""
    assert team._openmp() is not None, "torch has GNU's OpenMP runtime on this platform"


@pytest.mark.parametrize("form", FORMATS)
def test_a_product_reads_each_weight_as_it_is(form: str) -> None:
    matrix, weight = packed(form)
    units = np.eye(matrix.inputs, dtype=np.float32)  # every other term is 0, so a sum is one weight
    assert np.array_equal(multiply(matrix, units).T, weight)
    for column in (0, 40, INPUTS - 30):
        assert np.array_equal(multiply(matrix, units[column : column + 1])[0], weight[:, column])


@pytest.mark.parametrize("form", FORMATS)
def test_products_are_near_the_exact_ones(form: str) -> None:
    matrix, weight = packed(form)
    rows = random_rows(MOST_ROWS, matrix.inputs)
    bias = np.arange(matrix.outputs, dtype=np.float32)
    exact = rows.astype(np.float64) @ weight.T.astype(np.float64)
    bound = 1e-6 * (np.abs(rows) @ np.abs(weight).T)  # of the rounding of float32 sums
    assert (np.abs(multiply(matrix, rows) - exact) < bound).all()
    assert (np.abs(multiply(matrix, rows, bias=bias) - (exact + bias)) < bound + 1e-5).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_has_the_same_bits_among_any_number_of_rows(form: str) -> None:
    matrix, _ = packed(form)
    rows = random_rows(MOST_ROWS + 1, matrix.inputs)
    expected = multiply(matrix, rows)
    for count in range(1, MOST_ROWS + 1):
        assert np.array_equal(multiply(matrix, rows[:count]), expected[:count]), count
        assert np.array_equal(multiply(matrix, rows[-count:]), expected[-count:]), count


@pytest.mark.parametrize("form", FORMATS)
def test_threads_change_no_bits_even_if_they_are_more_than_tickets(form: str) -> None:
    matrix, _ = packed(form)
    for count in (1, 5, MOST_ROWS):
        rows = random_rows(count, matrix.inputs)
        expected = multiply(matrix, rows)
        for threads in (2, 3, 8):
            assert np.array_equal(multiply(matrix, rows, threads=threads), expected)


def test_integers_of_a_block_and_the_same_weights_as_floats_have_one_sum() -> None:
    matrix, weight = packed("int8")
    rows = random_rows(MOST_ROWS, matrix.inputs)
    assert np.array_equal(multiply(matrix, rows), multiply(pack(weight, "float32"), rows))
