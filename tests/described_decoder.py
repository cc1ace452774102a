"""A decoder's description computed in plain float32 torch, as the reference of the compiled pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from shared.models.description import AttentionDescription, Linear, ModelDescription, Norm, WeightName
from shared.models.rope import rotation_table

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def load(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder in float32."""
    return {name: tensor.float() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


class DescribedDecoder:
    """The model of a description and its weights."""

    def __init__(self, description: ModelDescription, weights: Mapping[str, Tensor]) -> None:
        self._description = description
        self._weights = weights

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(tokens, vocabulary)."""
        model = self._description
        x = self._weight(model.embedding)[list(tokens)] * model.embedding_multiplier
        for layer in model.layers:
            out = self._attention(layer.attention, self._norm(layer.attention_norm, x))
            x = x + layer.residual_multiplier * self._norm(layer.attention_post_norm, out)
            normed = self._norm(layer.mlp_norm, x)
            gate = ACTIVATIONS[layer.mlp.activation](self._linear(layer.mlp.gate, normed))
            out = self._linear(layer.mlp.down, gate * self._linear(layer.mlp.up, normed))
            x = x + layer.residual_multiplier * self._norm(layer.mlp_post_norm, out)
        logits = self._linear(model.head, self._norm(model.norm, x)) * model.logit_multiplier
        return _capped(logits, model.logit_softcap)

    def _attention(self, attention: AttentionDescription, x: Tensor) -> Tensor:
        rows, size = len(x), attention.head_size
        q, k, v = (self._linear(linear, x) for linear in (attention.q, attention.k, attention.v))
        if attention.norms_whole_row:
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        q, k, v = (each.view(rows, -1, size).transpose(0, 1) for each in (q, k, v))  # (heads, rows, size)
        if not attention.norms_whole_row:
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        q, k = _rotated(attention, q), _rotated(attention, k)
        k, v = (each.repeat_interleave(attention.heads // attention.kv_heads, dim=0) for each in (k, v))
        scores = _capped(q @ k.transpose(1, 2) * attention.scale, attention.softcap)
        age = torch.arange(rows)[:, None] - torch.arange(rows)
        visible = (age >= 0) & (age < (attention.window or rows))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return self._linear(attention.out, (weights @ v).transpose(0, 1).reshape(rows, -1))

    def _weight(self, name: WeightName) -> Tensor:
        tensor = self._weights[name.name]
        return tensor[name.first_row :] if name.rows is None else tensor[name.first_row : name.first_row + name.rows]

    def _linear(self, linear: Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight(linear.weight), linear.bias and self._weight(linear.bias))

    def _norm(self, norm: Norm | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        return normed * (norm.offset + self._weight(norm.gain))


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _rotated(attention: AttentionDescription, x: Tensor) -> Tensor:
    """x: (heads, rows, head size)."""
    if attention.rope is None:
        return x
    cosines, sines = (torch.from_numpy(table) for table in rotation_table(attention.rope, x.shape[1]))
    pairs = cosines.shape[1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], dim=-1)
