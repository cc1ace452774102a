"""The target's parts that a draft model uses, in the target's files. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from services.drafter.hidden.card import LayerConfig
from shared.errors import ModelError
from shared.kernels.finite import require_finite
from shared.kernels.weights import Floats
from shared.models.description import ModelDescription, NotDescribed
from shared.models.families import describe
from shared.models.folder import ModelFolder
from shared.models.safetensors_file import SafetensorsFile
from shared.models.shapes import refusals
from shared.models.weight_files import stored_tensors


def described_target(folder: ModelFolder) -> ModelDescription:
    """Return the description of the target. Raises ModelError if the compiled pass does not cover it."""
    try:
        with refusals(folder.path):
            return describe(folder.config, stored_tensors(folder.path))
    except NotDescribed as error:
        raise ModelError(
            f"{folder.path} is not a model that the compiled pass covers ({error}): a hidden-state draft reads its "
            "weights directly; choose another draft source (lookup, model, none)"
        ) from error


def layer_config(folder: ModelFolder) -> LayerConfig:
    """Return the shape of a Llama layer like the target's layers. Raises ModelError if the target is not covered."""
    model, config = described_target(folder), {**folder.config, **folder.text_config}
    attention, rope = model.layers[0].attention, config.get("rope_parameters") or {}
    try:
        return LayerConfig(
            hidden_size=model.hidden_size,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_size=attention.head_size,
            intermediate_size=config["intermediate_size"],
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
            norm_eps=model.norm.eps,
        )
    except (KeyError, ValidationError) as error:
        raise ModelError(f"{folder.path}/config.json does not describe a draft's layers: {error}") from error


def not_plain(folder: ModelFolder) -> str:
    """Return the reason for which a draft cannot run the target's first layers; empty for plain Llama layers."""
    config = folder.config
    rope = config.get("rope_parameters") or {}
    if (kind := config.get("model_type")) != "llama":
        return f"model_type {kind!r}"
    if config.get("hidden_act") != "silu":
        return f"hidden_act {config.get('hidden_act')!r}"
    if biases := [key for key in ("attention_bias", "mlp_bias") if config.get(key)]:
        return biases[0]
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return "" if kind == "default" else f"position embedding of the type {kind!r}"


def require_first_layers(folder: ModelFolder, count: int) -> None:
    """Raise ModelError if a draft is to run first layers that it cannot run."""
    if count and (reason := not_plain(folder)):
        raise ModelError(
            f"the first {count} layers of {folder.path} are no plain Llama layers ({reason}), which this draft would "
            "run: train another with `wisp draft train`, or choose another draft source (lookup, model, none)"
        )


@dataclass(frozen=True)
class LogitShape:
    """A model's way from the products of its head to logits."""

    multiplier: float = 1.0
    softcap: float = 0.0
    """0 for none."""

    @classmethod
    def of(cls, model: ModelDescription) -> LogitShape:
        """Return that of a model."""
        return cls(model.logit_multiplier, model.logit_softcap)

    def applied(self, products: Floats) -> Floats:
        """Return the logits of the head's products."""
        logits = products if self.multiplier == 1 else products * np.float32(self.multiplier)
        return logits if not self.softcap else np.tanh(logits / np.float32(self.softcap)) * np.float32(self.softcap)


UNSHAPED = LogitShape()
"""The head's products are the logits."""


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
        raise ModelError(f"{self._folder.path} has no weight {name}. Download the model again.")
