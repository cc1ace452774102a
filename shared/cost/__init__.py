"""Cost model of verification batches, and its fit. Pure: no I/O, no clock."""

from shared.cost.model import (
    EMPTY,
    FALLBACK,
    SIZE,
    features,
    fixed_ms,
    grow,
    predict_ms,
    prompt_token_ms,
    shape_of,
    token_ms,
)

__all__ = [
    "EMPTY",
    "FALLBACK",
    "SIZE",
    "features",
    "fit",
    "fixed_ms",
    "grow",
    "model",
    "predict_ms",
    "prompt_token_ms",
    "shape_of",
    "token_ms",
]
