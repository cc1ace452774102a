"""The target's parts that a draft model uses, in the target's files. Loads no torch."""

from __future__ import annotations

import json
from typing import Any

from numpy.typing import NDArray
from pydantic import ValidationError

from services.drafter.hidden.card import LayerConfig
from shared.errors import ModelError
from shared.kernels.finite import require_finite
from shared.models.folder import ModelFolder
from shared.models.safetensors_file import SafetensorsFile

EMBEDDING = "model.embed_tokens.weight"


def layer_config(folder: ModelFolder) -> LayerConfig:
    """Return the shape of the target's layers. Raises ModelError if they are not plain Llama layers."""
    config = json.loads((folder.path / "config.json").read_text())
    plain = config.get("hidden_act") == "silu" and not config.get("attention_bias") and not config.get("mlp_bias")
    rope = config.get("rope_parameters") or {}
    scaled = config.get("rope_scaling") or rope.get("rope_type", "default") != "default"
    if config.get("model_type") != "llama" or not plain or scaled:
        raise ModelError(
            f"{folder.path} is not a plain Llama model (model_type {config.get('model_type')!r}): a hidden-state draft "
            "reads its layers directly; choose another draft source (lookup, model, none)"
        )
    try:
        heads = config["num_attention_heads"]
        return LayerConfig(
            hidden_size=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
            norm_eps=config.get("rms_norm_eps", 1e-6),
        )
    except (KeyError, ValidationError) as error:
        raise ModelError(f"{folder.path}/config.json does not describe Llama layers: {error}") from error


def head_name(folder: ModelFolder) -> str:
    """Return the name of the head's weight; the embedding's if they are tied."""
    tied = json.loads((folder.path / "config.json").read_text()).get("tie_word_embeddings", False)
    return EMBEDDING if tied else "lm_head.weight"


class FolderTensors:
    """Tensors of a model folder by name, each mapped into memory on its own."""

    def __init__(self, folder: ModelFolder) -> None:
        """Raises ModelError if a file is missing or broken."""
        self._folder = folder
        self._files = [SafetensorsFile(path) for path in folder.weights]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a tensor; bits of bfloat16 as uint16. Raises ModelError if it is missing or not finite."""
        for file in self._files:
            if name in file.names:
                try:
                    # The check reads every page, so it has a mapping of its own, which is dropped.
                    require_finite(name, file.read(name))
                except ModelError as error:
                    raise ModelError(f"{self._folder.path}: {error}") from error
                return file.read(name)
        raise ModelError(f"{self._folder.path} has no weight {name}; a hidden-state draft needs a Llama-like target")
