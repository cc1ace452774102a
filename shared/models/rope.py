"""Rotary position embedding: inverse frequencies of every variant, and the table of cosines and sines.

A table has the same bits on every CPU. Only operations that IEEE 754 defines exactly are used (addition,
multiplication, division, square root, each rounded on its own), powers and logarithms come from `decimal`, and cosine
and sine are polynomials evaluated here: the last bit of a libm's pow, log, cos or sin differs between machines.

An angle depends on the position and the model only, never on the length of a session or on the rest of a batch, so that
a token's keys are the same whenever they are computed. Two variants are defined by the length in transformers; here a
model's maximum length decides:

- dynamic: the frequencies of lengths up to `max_position_embeddings`, which are the unscaled ones.
- longrope: the long factors if `max_position_embeddings` exceeds the original length, else the short ones, as in vLLM.
  transformers computes a session of at most the original length with the short factors.

The float32 roundings of a frequency are those of transformers' `ROPE_INIT_FUNCTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.models.configuration import Configuration
from shared.models.description import NotDescribed, OutOfRange, Rope

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

MOST_ELEMENTS = 1 << 14
"""Most rotated elements of a head."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGEST_ANGLE = 2.0**30
"""Its quarter turns are still an int32, and float32 no longer tells angles apart long before."""
CHUNK = 1 << 14
"""Angles computed at a time, so that the intermediate values stay in a core's cache."""


def rope_of(parameters: Mapping[str, Any], *, rotary_size: int, max_len: int) -> Rope:
    """Return the rope of one set of parameters in transformers' current form (`rope_type`, `rope_theta`, ...).

    rotary_size: number of elements of a head that are rotated. max_len: `max_position_embeddings`.
    Raises NotDescribed if the type or one of its parameters is unknown, or a number gives no usable angles."""
    values = Configuration(parameters, "the rope parameters")
    kind = values.text("rope_type", "default")
    if kind not in VARIANTS:
        raise NotDescribed(f"rope type {kind!r} is unknown")
    if rotary_size < 2 or rotary_size % 2:
        raise NotDescribed(f"{rotary_size} rotated elements of a head are not pairs")
    if rotary_size > MOST_ELEMENTS:
        raise OutOfRange(f"{rotary_size} rotated elements of a head are more than {MOST_ELEMENTS}")
    with np.errstate(all="ignore"):  # the outcome is checked
        inverse, scale = VARIANTS[kind](values, _frequencies(values.number("rope_theta"), rotary_size), max_len)
    values.refuse_unread()
    largest = float(inverse.max()) * max(max_len, 1)
    if not (np.isfinite(inverse).all() and inverse.min() >= 0 and largest <= LARGEST_ANGLE):
        raise OutOfRange(f"the rope parameters give angles from {inverse.min() * 1.0} to {largest}, out of range")
    if not (math.isfinite(scale) and 0 < scale < _FLOAT32_MAX):
        raise OutOfRange(f"the rope parameters scale cosines and sines by {scale}, which is out of range")
    return Rope(inverse_frequencies=tuple(inverse.tolist()), scale=scale)


def rotation_table(rope: Rope, max_len: int) -> tuple[Floats, Floats]:
    """Return cosine and sine of each position's angles times the scale, both (max_len, pairs).

    An angle is float32(position) * inverse frequency, rounded to float32, as in transformers."""
    inverse = np.array(rope.inverse_frequencies, np.float32)
    shape = (max_len, inverse.size)
    cosines, sines = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rows = max(1, CHUNK // inverse.size)
    for first in range(0, max_len, rows):
        last = min(first + rows, max_len)
        angles = np.arange(first, last).astype(np.float32)[:, None] * inverse
        cosines[first:last], sines[first:last] = _cosine_and_sine(angles.astype(np.float64))
    if rope.scale != 1:
        cosines *= np.float32(rope.scale)
        sines *= np.float32(rope.scale)
    return cosines, sines


def _frequencies(base: float, rotary_size: int) -> Floats:
    """Return base ** (2 i / rotary_size) for each pair i."""
    exponents = np.arange(0, rotary_size, 2).astype(np.float32) / np.float32(rotary_size)
    context = Context(prec=40)
    exact = Decimal(float(np.float32(base)))
    return np.array([float(context.power(exact, Decimal(float(each)))) for each in exponents], np.float32)


def _log(value: float) -> float:
    return float(Context(prec=40).ln(Decimal(value)))


def _one_over(values: Floats) -> Floats:
    return np.float32(1) / values


def _default(values: Configuration, frequencies: Floats, max_len: int) -> tuple[Floats, float]:
    return _one_over(frequencies), 1.0


def _linear(values: Configuration, frequencies: Floats, max_len: int) -> tuple[Floats, float]:
    return _one_over(frequencies) / np.float32(values.number("factor")), 1.0


def _dynamic(values: Configuration, frequencies: Floats, max_len: int) -> tuple[Floats, float]:
    values.number("factor")
    return _one_over(frequencies), 1.0


def _llama3(values: Configuration, frequencies: Floats, max_len: int) -> tuple[Floats, float]:
    """Divide long wavelengths by the factor, keep short ones, and interpolate between the two."""
    factor = np.float32(values.number("factor"))
    low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
    original = values.whole("original_max_position_embeddings", max_len)
    if high <= low:
        raise NotDescribed(f"high_freq_factor {high} is not above low_freq_factor {low}")
    inverse = _one_over(frequencies)
    wavelengths = np.float32(2 * math.pi) / inverse
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * inverse / factor + smooth * inverse
    long = wavelengths > np.float32(original / low)
    short = wavelengths < np.float32(original / high)
    return np.where(long, inverse / factor, np.where(short, inverse, between)), 1.0


def _yarn(values: Configuration, frequencies: Floats, max_len: int) -> tuple[Floats, float]:
    """Mix the unscaled frequencies and those divided by the factor, by a ramp over the pairs."""
    original = values.whole("original_max_position_embeddings", max_len)
    factor = values.optional_number("factor", ...) or max_len / original
    fast = values.optional_number("beta_fast") or 32.0
    slow = values.optional_number("beta_slow") or 1.0
    size = 2 * frequencies.size
    spread = 2 * _log(values.number("rope_theta"))
    if spread == 0:
        raise NotDescribed("rope_theta is 1")

    def pair_that_turns(times: float) -> float:
        return size * _log(original / (times * 2 * math.pi)) / spread

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if values.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(frequencies.size, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    unscaled = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    scaled = _one_over(np.float32(factor) * frequencies)
    return scaled * (np.float32(1) - unscaled) + _one_over(frequencies) * unscaled, _yarn_scale(values, factor)


def _yarn_scale(values: Configuration, factor: float) -> float:
    given = values.optional_number("attention_factor")
    mscale, mscale_all = values.optional_number("mscale"), values.optional_number("mscale_all_dim")
    if given is not None:
        return given

    def growth(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * _log(factor) + 1.0

    return growth(mscale) / growth(mscale_all) if mscale and mscale_all else growth(1.0)


def _longrope(values: Configuration, frequencies: Floats, max_len: int) -> tuple[Floats, float]:
    """Divide each pair's frequency by a factor of its own."""
    original = values.whole("original_max_position_embeddings", max_len)
    factors = {name: values.numbers(name) for name in ("short_factor", "long_factor")}
    for name, numbers in factors.items():
        if len(numbers) != frequencies.size:
            raise NotDescribed(f"{name} has {len(numbers)} values for {frequencies.size} pairs")
    chosen = factors["long_factor" if max_len > original else "short_factor"]
    factor = values.optional_number("factor") or max_len / original
    scale = values.optional_number("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + _log(factor) / _log(original))
    return _one_over(np.array(chosen, np.float32) * frequencies), scale


VARIANTS: dict[str, Callable[[Configuration, Floats, int], tuple[Floats, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By type, the function of the parameters, of base ** (2 i / size) for each pair i, and of `max_position_embeddings`
that returns the inverse frequencies and the scale."""

HALF_PI = (1.570796325802803, 9.920935791635221e-10, 5.170182981794105e-19)
"""Pi / 2 as a sum. The first two parts have 30 bits: their products with a number of quarter turns are exact."""
SINE = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
        2.75573137070700676789e-06, -2.50507602534068634195e-08)  # fmt: skip
COSINE = (-0.5, 4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
          -2.75573143513906633035e-07, 2.08757232129817482790e-09)  # fmt: skip
"""Coefficients of fdlibm without the last of each, which is below 1e-11 here."""


def _cosine_and_sine(angles: Doubles) -> tuple[Doubles, Doubles]:
    """Return cosine and sine of angles from 0 to some 10^7, to 1e-11."""
    turns = np.rint(angles * (2 / math.pi))
    rest = angles - turns * HALF_PI[0]
    rest -= turns * HALF_PI[1]
    rest -= turns * HALF_PI[2]
    square = rest * rest
    sine = _polynomial(SINE, square)
    sine *= square
    sine += 1
    sine *= rest
    cosine = _polynomial(COSINE, square)
    cosine *= square
    cosine += 1
    quarter = turns.astype(np.int32)
    odd = (quarter & 1) != 0
    cosines = np.where(odd, sine, cosine)
    sines = np.where(odd, cosine, sine)
    np.negative(cosines, out=cosines, where=((quarter + 1) & 2) != 0)
    np.negative(sines, out=sines, where=(quarter & 2) != 0)
    return cosines, sines


def _polynomial(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    result = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result += coefficient
        result *= x
    result += coefficients[0]
    return result
