"""Refusal of weights that are not finite.

In the KV cache one such value would outlive its session: a masked position is multiplied by zero, and zero times NaN is
NaN. So the next session that gets the block would get wrong results too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.kernels.formats import Blocks

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "int8": 127 * 65504.0}
"""Largest magnitude that a format of weights holds, where it is less than float32's."""


def require_finite(name: str, weight: NDArray[Any] | Blocks) -> None:
    """Raise ModelError, with the name, unless all values are finite. Reads a matrix twice, without a copy."""
    parts = (weight.scales, weight.minima) if isinstance(weight, Blocks) else (weight,)
    if not all(_finite(part) for part in parts if part is not None):
        raise ModelError(
            f"the weight {name} has values that are not finite (NaN or infinite): the file is damaged, or the training "
            "failed. Download the model again, or name another"
        )


def require_in_range(name: str, weight: NDArray[np.float32], form: str) -> None:
    """Raise ModelError if a value is larger than this format of weights holds."""
    limit = LARGEST.get(form)
    if limit is not None and weight.size and (largest := max(float(weight.max()), -float(weight.min()))) > limit:
        raise ModelError(
            f"the weight {name} has a value of magnitude {largest:.3g}, and {form} holds at most {limit:.3g}: set the "
            "dtype to float32, if the file is not damaged"
        )


def _finite(values: NDArray[Any]) -> bool:
    if not values.size:
        return True
    if values.dtype == np.uint16:  # bits of bfloat16: the exponent of what is not finite has all bits set
        return int(values.max()) < 0xFF80 and int(values.view(np.int16).max()) < 0x7F80
    # The sum of finite values may overflow, but one that is finite proves all values finite.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(values, axis=None)
    return bool(np.isfinite(total) or np.isfinite(values).all())
