"""The tensors of a trained draft, as its file holds them. Loads no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.drafter.hidden.card import CONFIG, WEIGHTS, HiddenDraftConfig, HiddenDraftFolder
from shared.errors import ModelError
from shared.kernels.finite import require_finite
from shared.kernels.weights import floats
from shared.models.safetensors_file import SafetensorsFile
from shared.models.weight_files import some_names

HEAD_IDS = "head_ids"


def draft_tensors(folder: HiddenDraftFolder) -> dict[str, NDArray[Any]]:
    """Return the weights by name, bfloat16 as its bits, and `head_ids` as int64.

    Raises ModelError if one has no place in the model of `config.json`, is missing, or has values that cannot be used.
    """
    config = folder.card.model
    try:
        file = SafetensorsFile(folder.path / WEIGHTS)
        names = set(file.names) - {HEAD_IDS}
        if config.layers > len(names):
            raise ModelError(f"{config.layers} layers, and only {len(names)} weights")
        wrong = {name for name, _ in {name: file.shape(name) for name in names}.items() ^ _shapes(config).items()}
        if wrong or HEAD_IDS not in file.names:
            raise ModelError(f"unexpected, missing or of another shape: {some_names(wrong) or HEAD_IDS}")
        found = {name: _weight(name, file.read(name)) for name in names}
        if not (floats(found["spread"]) > 0).all():
            raise ModelError("spread, by which states are divided, has values that are not above 0")
        found[HEAD_IDS] = _ascending_ids(file.read(HEAD_IDS), config.vocab_size)
    except ModelError as error:
        raise ModelError(
            f"{folder.path / WEIGHTS} does not fit its {CONFIG}: {error}; copy the draft again, or train one with "
            "`wisp draft train`"
        ) from error
    return found


def _weight(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return a weight. Raises ModelError unless all its values are finite floating-point numbers."""
    if array.dtype.kind == "i":
        raise ModelError(f"{name} is of {array.dtype}, not of floating-point numbers")
    require_finite(name, array)
    return array


def _ascending_ids(ids: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Return the ids as int64. Raises ModelError unless they are ascending token ids."""
    if ids.dtype.kind != "i" or ids.ndim != 1 or not len(ids):
        raise ModelError(f"{HEAD_IDS} is {ids.dtype} of shape {ids.shape}, not a list of integers")
    if ids[0] < 0 or ids[-1] >= vocab_size or (np.diff(ids) <= 0).any():
        raise ModelError(f"{HEAD_IDS} are not ascending ids of a vocabulary of {vocab_size}")
    return ids.astype(np.int64)


def _shapes(config: HiddenDraftConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of the model (`model.HiddenDraft`) by name."""
    layer, size = config.layer, config.layer.hidden_size
    inner, kv = layer.heads * layer.head_size, layer.kv_heads * layer.head_size
    of_layer = {
        "attention_norm.weight": (size,),
        "qkv.weight": (inner + 2 * kv, size),
        "out.weight": (size, inner),
        "mlp_norm.weight": (size,),
        "gate_up.weight": (2 * layer.intermediate_size, size),
        "down.weight": (size, layer.intermediate_size),
    }
    return {
        "spread": (size,),
        "fc.weight": (size, (3 if config.bottom_layers else 2) * size),
        "norm.weight": (size,),
        **{f"layers.{n}.{name}": shape for n in range(config.layers) for name, shape in of_layer.items()},
    }


def matrix(array: NDArray[Any]) -> NDArray[Any]:
    """Return a weight as the kernels pack it: bits of bfloat16 (uint16) as they are, other types as float32."""
    return np.ascontiguousarray(array if array.dtype == np.uint16 else array.astype(np.float32, copy=False))
