"""A draft model that reads the target's final hidden states, after EAGLE (arXiv 2401.15077).

At position t the model reads the token x_t and the target's final hidden state h_(t-1), which x_t was chosen from:

    b_t = bottom(x_1 ... x_t)                       the target's own first layers, frozen
    u_t = fc [ rms(embedding(x_t)) ; rms(b_t) ; h_(t-1) / spread ]
    g_t = norm( layers(u_1 ... u_t) )               an estimate of h_t; the target's own head turns it into logits

`spread` is the standard deviation of each channel of h. Beyond the last committed token the model continues from its
own estimates. Embedding, first layers and head are the target's, read from its folder: they are neither trained nor
stored with the draft. The first layers hold which tokens follow which, rare ones included, better than a few million
training tokens could teach; EAGLE uses none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.drafter.hidden.card import HiddenDraftConfig, LayerConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer. Arguments: its number; q, k and v, each (..., tokens, heads, head size), q and k rotated.
Returns q's shape."""


class RmsNorm(nn.Module):
    """Root mean square norm with a learned gain, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Layer(nn.Module):
    """A Llama decoder layer without the attention itself, which the caller computes."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        size, inner, kv = config.hidden_size, config.heads * config.head_size, config.kv_heads * config.head_size
        self.attention_norm = RmsNorm(size, config.norm_eps)
        self.qkv = nn.Linear(size, inner + 2 * kv, bias=False)
        self.out = nn.Linear(inner, size, bias=False)
        self.mlp_norm = RmsNorm(size, config.norm_eps)
        self.gate_up = nn.Linear(size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, size, bias=False)

    def queries_keys_values(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values: each (..., tokens, heads, head size), queries and keys rotated."""
        c = self.config
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (c.heads + 2 * c.kv_heads, c.head_size))
        turned = _rotated(heads[..., : c.heads + c.kv_heads, :], rotation)
        return turned[..., : c.heads, :], turned[..., c.heads :, :], heads[..., c.heads + c.kv_heads :, :]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for positions (..., tokens); a model's layers share them."""
        # Not a buffer of the module: it would be rounded with the weights, and bfloat16 is too coarse for angles.
        half = self.config.head_size // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, device=positions.device) / half)
        angles = positions[..., None, None].float() * frequencies
        return angles.cos(), angles.sin()

    def outputs(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output. x: its input. attended: attention's output, (..., tokens, heads, head size)."""
        x = x + self.out(attended.flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding with the two halves of a head as pairs, as in Llama."""
    cos, sin = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class HiddenDraft(nn.Module):
    """The trained part of the model: `fc`, the layers, the last norm."""

    spread: Tensor

    def __init__(self, config: HiddenDraftConfig) -> None:
        super().__init__()
        self.config = config
        size = config.layer.hidden_size
        self.register_buffer("spread", torch.ones(size))
        self.fc = nn.Linear((3 if config.bottom_layers else 2) * size, size, bias=False)
        self.layers = nn.ModuleList(Layer(config.layer) for _ in range(config.layers))
        self.norm = RmsNorm(size, config.layer.norm_eps)

    def known(self, embedded: Tensor, bottom: Tensor | None) -> Tensor:
        """Return the part of the input that depends on tokens only.

        embedded, bottom: embeddings and the first layers' outputs, (..., size) each; `bottom` is None for a draft that
        runs none of the target's layers.
        """
        eps = self.config.layer.norm_eps
        parts = [embedded] if bottom is None else [embedded, bottom]
        return torch.cat([functional.rms_norm(part.float(), part.shape[-1:], eps=eps) for part in parts], -1)

    def inputs(self, known: Tensor, hidden: Tensor) -> Tensor:
        """Return u. known: of `known`. hidden: the states before the tokens, (..., size)."""
        joined = torch.cat([known, hidden.float() / self.spread], -1)
        return self.fc(joined.to(self.fc.weight.dtype))  # type: ignore[no-any-return]


def run_layers(layers: Sequence[Layer], x: Tensor, positions: Tensor, attend: Attend, first: int = 0) -> Tensor:
    """Run x (..., tokens, size) through the layers. first: number of the first layer, for `attend`."""
    rotation = layers[0].rotation(positions)
    for number, layer in enumerate(layers, first):
        x = layer.outputs(x, attend(number, *layer.queries_keys_values(x, rotation)))
    return x
