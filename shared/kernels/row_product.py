"""One matrix product over rows by compiled code, outside a decoder."""

from __future__ import annotations

import numpy as np

from shared.kernels import native, team
from shared.kernels.cache import float_bits
from shared.kernels.layout import FUNCTIONS, PASS_WORDS, UNPACKED_FLOATS, JobWord, PassWord, ProductWord
from shared.kernels.weights import Floats, Product


class RowProduct:
    """A product and its buffers. The bits of an output row depend on the weights and the input row alone.

    Not thread-safe.
    """

    def __init__(self, product: Product, threads: int) -> None:
        """threads: at most this many."""
        packed = product.packed
        self._product, self._threads = product, threads
        self._function = native.load()
        self._inputs, self._input_stride = packed.inputs, packed.padded_inputs
        self._outputs, self._output_stride = packed.outputs, packed.padded_outputs
        self._job, self._counters = team.job_words(PASS_WORDS, 1)
        self._job[JobWord.FUNCTION] = FUNCTIONS.index("multiply_rows")
        self._scratch = np.zeros((threads, UNPACKED_FLOATS), np.float32)
        self._x = np.zeros((0, self._input_stride), np.float32)
        for word, value in (
            (PassWord.HIDDEN_STRIDE, self._input_stride),
            (PassWord.LOGITS_STRIDE, self._output_stride),
            (PassWord.LOGIT_MULTIPLIER, float_bits(1.0)),
            (PassWord.SCRATCH, self._scratch.ctypes.data),
            (PassWord.SCRATCH_BYTES, self._scratch.strides[0]),
        ):
            self._job[word] = value
        self._job[PassWord.HEAD : PassWord.HEAD + len(ProductWord)] = product.words()

    def inputs(self, rows: int) -> Floats:
        """Return a buffer for this many input rows, a view that the next call overwrites: (rows, inputs)."""
        if rows > len(self._x):
            # The padding columns are zero and stay so.
            self._x = np.zeros((max(16, rows), self._input_stride), np.float32)
            self._job[PassWord.X] = self._x.ctypes.data
        return self._x[:rows, : self._inputs]

    def multiply(self, rows: int) -> Floats:
        """Return the products of the buffer's first `rows` rows, new: (rows, outputs)."""
        y = np.empty((rows, self._output_stride), np.float32)
        self._job[PassWord.ROWS], self._job[PassWord.LOGITS] = rows, y.ctypes.data
        team.run(self._function, self._job, self._counters, self._threads)
        return y[:, : self._outputs]
