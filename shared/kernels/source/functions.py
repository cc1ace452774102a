"""Functions of one float32 for compiled code: a fixed sequence of operations, so the same bits on every CPU.

libm's functions differ between machines in the last bit. These are inlined, and LLVM computes several at once where
they stand in a loop.
"""

# numba's annotations do not cover the types in compiled code.
# mypy: disable-error-code="arg-type, call-arg"

from __future__ import annotations

from typing import Any

import numpy as np

from shared.kernels.source.vectors import bits_of, fma, from_bits, inlined

LOG2_E = np.float32(1.4426950408889634)


@inlined
def larger(x: Any, y: Any) -> Any:
    """Return the larger of two floats; `y` if one is NaN. A single vector instruction, unlike Python's `max`."""
    return x if x > y else y


@inlined
def exp2(x: Any) -> Any:
    """Return 2^x for x <= 127, relative error below 2e-7; x below -126 counts as -126. Cephes' polynomial of exp2f."""
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
    return y * from_bits(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@inlined
def _magnitude(x: Any) -> Any:
    return from_bits(bits_of(x) & np.int32(0x7FFFFFFF))


@inlined
def _with_sign_of(magnitude: Any, x: Any) -> Any:
    return magnitude if x >= np.float32(0) else -magnitude


@inlined
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent, absolute error below 3e-7."""
    t = exp2(_magnitude(x) * (np.float32(-2) * LOG2_E))
    return _with_sign_of((np.float32(1) - t) / (np.float32(1) + t), x)


@inlined
def silu(x: Any) -> Any:
    """Return x / (1 + e^-x)."""
    t = exp2(_magnitude(x) * -LOG2_E)  # at most 1, so that nothing overflows
    return x * ((np.float32(1) if x >= np.float32(0) else t) / (np.float32(1) + t))


@inlined
def gelu(x: Any) -> Any:
    """Return x (1 + erf(x / sqrt 2)) / 2, erf by formula 7.1.26 of Abramowitz and Stegun (absolute error 1.5e-7)."""
    z = _magnitude(x) * np.float32(0.7071067811865476)
    t = np.float32(1) / fma(np.float32(0.3275911), z, np.float32(1))
    y = np.float32(1.061405429)
    y = fma(y, t, np.float32(-1.453152027))
    y = fma(y, t, np.float32(1.421413741))
    y = fma(y, t, np.float32(-0.284496736))
    y = fma(y, t, np.float32(0.254829592))
    erf = np.float32(1) - y * t * exp2(-(z * z) * LOG2_E)
    return np.float32(0.5) * x * (np.float32(1) + _with_sign_of(erf, x))


@inlined
def gelu_tanh(x: Any) -> Any:
    """Return x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * (x * x * x))
    return np.float32(0.5) * x * (np.float32(1) + tanh(inner))
