"""The target's parts that a draft model uses, read from the target's files without loading its other weights."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from services.drafter.hidden.card import LayerConfig
from services.drafter.hidden.model import Layer
from shared.engine.weights import as_matrix
from shared.errors import ModelError
from shared.kernels.finite import require_finite
from shared.models.folder import ModelFolder

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TargetParts:
    """The target's embedding, head, first layers and last norm.

    Embedding and head are (vocabulary, hidden size) each, and one tensor if they are tied.
    """

    embedding: Tensor
    head: Tensor
    bottom: nn.ModuleList
    norm: Tensor
    """Gain of the last norm: (hidden size,)."""

    def to(self, torch_device: str) -> TargetParts:
        """Return the parts on a torch device; a tied head stays tied."""
        embedding = self.embedding.to(torch_device)
        head = embedding if self.head is self.embedding else self.head.to(torch_device)
        return TargetParts(embedding, head, self.bottom.to(torch_device), self.norm.to(torch_device))


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


def target_parts(folder: ModelFolder, bottom_layers: int, dtype: torch.dtype) -> TargetParts:
    """Read the parts. Raises ModelError if a weight is missing or the target has too few layers."""
    config = layer_config(folder)
    tensors = FolderTensors(folder, dtype)
    embedding = tensors[EMBEDDING]
    layers = nn.ModuleList(Layer(config).to(dtype) for _ in range(bottom_layers))
    for number, layer in enumerate(layers):
        _fill(layer, tensors, f"model.layers.{number}")
    layers.requires_grad_(requires_grad=False)
    head = embedding if head_name(folder) == EMBEDDING else tensors["lm_head.weight"]
    return TargetParts(embedding, head, layers, tensors["model.norm.weight"])


def head_name(folder: ModelFolder) -> str:
    """Return the name of the head's weight; the embedding's if they are tied."""
    tied = json.loads((folder.path / "config.json").read_text()).get("tie_word_embeddings", False)
    return EMBEDDING if tied else "lm_head.weight"


def _fill(layer: nn.Module, weights: FolderTensors, prefix: str) -> None:
    def joined(*names: str) -> Tensor:
        return torch.cat([weights[f"{prefix}.{name}.weight"] for name in names])

    attention, mlp = "self_attn.", "mlp."
    layer.load_state_dict(
        {
            "attention_norm.weight": joined("input_layernorm"),
            "qkv.weight": joined(*(f"{attention}{name}_proj" for name in "qkv")),
            "out.weight": joined(f"{attention}o_proj"),
            "mlp_norm.weight": joined("post_attention_layernorm"),
            "gate_up.weight": joined(f"{mlp}gate_proj", f"{mlp}up_proj"),
            "down.weight": joined(f"{mlp}down_proj"),
        }
    )


class FolderTensors:
    """Tensors of a model folder by name, each mapped into memory on its own.

    Pages of the file that were read leave memory with the tensor.
    """

    def __init__(self, folder: ModelFolder, dtype: torch.dtype | None = None) -> None:
        """dtype: type of the tensors; None for that of the file."""
        self._folder, self._dtype = folder, dtype

    def __getitem__(self, name: str) -> Tensor:
        for path in self._folder.weights:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    tensor: Tensor = file.get_tensor(name)
                    try:
                        require_finite(name, as_matrix(tensor))
                    except ModelError as error:
                        raise ModelError(f"{self._folder.path}: {error}") from error
                    return tensor.to(self._dtype or tensor.dtype)
        raise ModelError(f"{self._folder.path} has no weight {name}; a hidden-state draft needs a Llama-like target")
