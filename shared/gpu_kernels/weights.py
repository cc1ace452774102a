"""A described model's weights on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.gpu_kernels.products import DeviceProduct, ReadWeight, WeightLoader
from shared.models.description import LayerDescription, Linear, ModelDescription, Norm


@dataclass(frozen=True, slots=True)
class DeviceNorm:
    """A norm's gains, with their offset, in float32."""

    gain: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """A layer's weights."""

    description: LayerDescription
    qkv: DeviceProduct
    out: DeviceProduct
    gate: DeviceProduct
    up: DeviceProduct
    down: DeviceProduct
    attention_norm: DeviceNorm | None
    attention_post_norm: DeviceNorm | None
    mlp_norm: DeviceNorm | None
    mlp_post_norm: DeviceNorm | None
    q_norm: DeviceNorm | None
    k_norm: DeviceNorm | None


class DeviceModel:
    """The weights of a model, or of the part of one that a GPU computes (`parts`)."""

    def __init__(self, model: ModelDescription, read: ReadWeight, form: str, torch_device: torch.device) -> None:
        """Read the weights one after the other. form: a key of `products.DTYPES`. Raises ModelError and EngineError."""
        loader = WeightLoader(read, form, torch_device)

        def norm(described: Norm | None) -> DeviceNorm | None:
            return DeviceNorm(loader.vector(described.gain, described.offset), described.eps) if described else None

        self.embedding = loader.product([Linear(model.embedding)])
        self.head = self.embedding if model.is_tied else loader.product([model.head])
        self.norm = norm(model.norm)
        self.layers: list[DeviceLayer] = []
        for layer in model.layers:
            attention, mlp = layer.attention, layer.mlp
            biased = mlp.gate.bias is not None or mlp.up.bias is not None
            self.layers.append(
                DeviceLayer(
                    layer,
                    qkv=loader.product([attention.q, attention.k, attention.v]),
                    out=loader.product([attention.out]),
                    gate=loader.product([mlp.gate], biased=biased),
                    up=loader.product([mlp.up], biased=biased),
                    down=loader.product([mlp.down]),
                    attention_norm=norm(layer.attention_norm),
                    attention_post_norm=norm(layer.attention_post_norm),
                    mlp_norm=norm(layer.mlp_norm),
                    mlp_post_norm=norm(layer.mlp_post_norm),
                    q_norm=norm(attention.q_norm),
                    k_norm=norm(attention.k_norm),
                )
            )

    def products(self) -> list[DeviceProduct]:
        """Return one product of each shape."""
        found = {}
        for layer in self.layers:
            for product in (layer.qkv, layer.out, layer.gate, layer.down):
                found[tuple(product.weight.shape)] = product
        found[tuple(self.head.weight.shape)] = self.head
        return list(found.values())
