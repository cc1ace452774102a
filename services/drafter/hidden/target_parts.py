"""The target's parts that a draft model uses, as torch tensors and modules: for training, and for accelerators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.drafter.hidden.model import Layer
from services.drafter.hidden.target import UNSHAPED, FolderTensors, LogitShape, described_target, layer_config
from shared.models.folder import ModelFolder


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
    logits: LogitShape = UNSHAPED

    def to(self, torch_device: str) -> TargetParts:
        """Return the parts on a torch device; a tied head stays tied."""
        embedding = self.embedding.to(torch_device)
        head = embedding if self.head is self.embedding else self.head.to(torch_device)
        bottom = self.bottom.to(torch_device)
        return TargetParts(embedding, head, bottom, self.norm.to(torch_device), self.logits)


def target_parts(folder: ModelFolder, bottom_layers: int, dtype: torch.dtype) -> TargetParts:
    """Read the parts. Raises ModelError if a weight is missing or the target has too few layers."""
    config, model = layer_config(folder), described_target(folder)
    tensors = FolderTensors(folder)

    def read(name: str) -> Tensor:
        return as_tensor(tensors[name]).to(dtype)

    embedding = read(model.embedding.name)
    layers = nn.ModuleList(Layer(config).to(dtype) for _ in range(bottom_layers))
    for number, layer in enumerate(layers):
        _fill(layer, read, f"model.layers.{number}")
    layers.requires_grad_(requires_grad=False)
    head = embedding if model.head.weight == model.embedding else read(model.head.weight.name)
    norm = read(model.norm.gain.name) + model.norm.offset
    return TargetParts(embedding, head, layers, norm, LogitShape.of(model))


def _fill(layer: nn.Module, read: Callable[[str], Tensor], prefix: str) -> None:
    def joined(*names: str) -> Tensor:
        return torch.cat([read(f"{prefix}.{name}.weight") for name in names])

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


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor of the same memory; bits of bfloat16 (uint16) become that type."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
