"""Models of known shapes with random weights, made in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.models.bfloat16 import nearest_bits
from shared.models.description import ModelDescription, WeightName
from shared.models.families import describe

SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "tiny": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 512,
        "num_hidden_layers": 1,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "num_hidden_layers": 30,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "num_hidden_layers": 36,
    },
    "qwen3-32b": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "num_hidden_layers": 64,
    },
}  # fmt: skip
"""Configurations by name, without what has a default."""
PATTERN: Final = 4_194_301
"""Random weights that every matrix repeats, from a place of its own. Drawing billions takes minutes; a prime, so that
no two rows of a matrix are alike."""
DEVIATION: Final = 0.02
"""Standard deviation of the weights: the default of transformers' untrained models."""


def configuration(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Return a model's config.json. layers: number of layers, if not the shape's own."""
    config = {
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **SHAPES[shape],
    }  # fmt: skip
    return config | ({"num_hidden_layers": layers} if layers else {})


class RandomModel:
    """A description and a reader of its weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self._shapes = dict(_shapes(config))
        self.description: ModelDescription = describe(config, self._shapes.keys())
        levels = [NormalDist(0, DEVIATION).inv_cdf((number + 0.5) / 256) for number in range(256)]
        drawn = np.frombuffer(np.random.default_rng(0).bytes(PATTERN), np.uint8)
        self._drawn = np.tile(nearest_bits(np.array(levels, np.float32))[drawn], 2)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes[name]

    def read(self, weight: WeightName) -> NDArray[Any]:
        """Return a weight as bits of bfloat16, the same at each call; gains as ones."""
        shape = self._shapes[weight.name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        first = int(np.random.default_rng(np.frombuffer(weight.name.encode(), np.uint8)).integers(PATTERN))
        matrix = np.resize(self._drawn[first : first + PATTERN], shape)
        return matrix if weight.rows is None else matrix[weight.first_row : weight.first_row + weight.rows]


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a Llama or Qwen 3 and their shapes."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
        for name, outputs in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}self_attn.{name}_proj.weight", (outputs, hidden)
        yield f"{layer}self_attn.o_proj.weight", (hidden, q)
        for name in ("gate", "up"):
            yield f"{layer}mlp.{name}_proj.weight", (inner, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, inner)
        if config["model_type"] == "qwen3":
            yield f"{layer}self_attn.q_norm.weight", (size,)
            yield f"{layer}self_attn.k_norm.weight", (size,)
