"""Options of the decoder families: the keys of `config.json` that each has, and the defaults of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Literal

from shared.models.configuration import Configuration
from shared.models.description import NotDescribed

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers: those that attend to all tokens, and those with a window."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    max_len: int


@dataclass(frozen=True, slots=True)
class RopeByType:
    """The two ropes of a family whose layers with and without a window differ."""

    sliding_theta_key: str | None
    """Key of an old configuration's theta for layers with a window."""
    sliding_theta: float


@dataclass(frozen=True, slots=True)
class Family:
    """The options of one `model_type`."""

    layout: Literal["pre", "post", "both"] = "pre"
    """Position of the norms in a layer, relative to attention and MLP."""
    norm_offset: float = 0.0
    eps: float = 1e-6
    head_norms: Literal["each", "whole row"] | None = None
    """Norms of q and k, over each head or over the whole row."""
    activation_key: str = "hidden_act"
    activation: str = "silu"
    activation_aliases: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    """Default of `tie_word_embeddings`."""
    kv_heads_required: bool = False
    """True if an absent `num_key_value_heads` does not stand for as many as there are of q."""
    head_size: int | None = None
    """Default of `head_dim`; None for hidden size / heads."""
    qkv_bias: bool = False
    """True if q, k and v always have a bias."""
    attention_bias: bool = False
    """True if `attention_bias` gives q, k, v and the output a bias."""
    mlp_bias: bool = False
    """True if `mlp_bias` gives gate, up and down a bias."""
    fused: bool = False
    """True if q, k and v are rows of one tensor, and gate and up of another."""
    layer_types: Callable[[Configuration, int], list[str]] = lambda config, layers: [FULL] * layers
    window: int | EllipsisType | None = ...
    """Default of `sliding_window`; ... for a family without windows."""
    theta: float = 10_000.0
    partial_rope: bool = False
    """True if `partial_rotary_factor` may be below 1."""
    original_len: int | None = None
    """Default of a top-level `original_max_position_embeddings`."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    rope_by_type: RopeByType | None = None
    skips_rope: bool = False
    """True if `no_rope_layers` selects layers without position embedding."""
    scale: Callable[[Configuration, Sizes], float] = lambda config, sizes: 1 / math.sqrt(sizes.head)
    """Factor of the attention scores."""
    softcaps: Mapping[str, float | None] = field(default_factory=dict)
    """Keys of soft caps, with their defaults."""
    multipliers: bool = False
    """True if the configuration has multipliers of embedding, residuals and logits."""
    embedding_by_size: bool = False
    """True if embeddings are multiplied by the root of the hidden size."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Further values that change nothing, by key."""
    neutral_rope: tuple[str, ...] = ()
    """Keys of the rope parameters that change nothing."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Sizes that folders of this family leave to transformers' defaults."""


def _given_types(config: Configuration) -> list[str] | None:
    return None if config.value("layer_types", None) is None else config.texts("layer_types")


def _same_types(default: int | None) -> Callable[[Configuration, int], list[str]]:
    """Give the window, if there is one, to all layers."""
    return lambda config, layers: [SLIDING if config.optional_whole("sliding_window", default) else FULL] * layers


def _qwen_types(config: Configuration, layers: int) -> list[str]:
    used = config.flag("use_sliding_window", False) and config.optional_whole("sliding_window", 4096) is not None
    first = config.whole("max_window_layers", 28, least=0)
    types = _given_types(config) or [SLIDING if used and i >= first else FULL for i in range(layers)]
    return _checked_use(types, used)


def _smollm3_types(config: Configuration, layers: int) -> list[str]:
    used = config.flag("use_sliding_window", False) and config.optional_whole("sliding_window", None) is not None
    computed = [SLIDING if used and not has_rope else FULL for has_rope in roped(config, layers)]
    return _checked_use(_given_types(config) or computed, used)


def _checked_use(types: list[str], used: bool) -> list[str]:
    if SLIDING in types and not used:
        raise NotDescribed("layers have a window, but use_sliding_window or sliding_window is off")
    return types


def _full_every(period: int, period_key: str | None = None) -> Callable[[Configuration, int], list[str]]:
    """Let every period-th layer attend to all tokens."""

    def types(config: Configuration, layers: int) -> list[str]:
        every = config.whole(period_key, period) if period_key else period
        return _given_types(config) or [SLIDING if (i + 1) % every else FULL for i in range(layers)]

    return types


def roped(config: Configuration, layers: int) -> list[bool]:
    """Report for each layer whether it has a position embedding."""
    period = config.whole("no_rope_layer_interval", 4)
    if config.value("no_rope_layers", None) is None:
        return [(i + 1) % period != 0 for i in range(layers)]
    marks = config.wholes("no_rope_layers")
    if len(marks) < layers or set(marks) - {0, 1}:
        raise config.unusable("no_rope_layers", "a list with 1 or 0 for each layer")
    return [mark == 1 for mark in marks[:layers]]


def _query_scalar(config: Configuration, sizes: Sizes) -> float:
    return 1 / math.sqrt(config.number("query_pre_attn_scalar", 256))


GEMMA = Family(
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
    activation_aliases={"gelu": "gelu_pytorch_tanh"},
    tied=True,
    kv_heads_required=True,
    head_size=256,
    attention_bias=True,
    embedding_by_size=True,
    neutral={"hidden_activation": ("gelu_pytorch_tanh", None)},
)
GEMMA2 = replace(
    GEMMA,
    layout="both",
    activation_key="hidden_activation",
    activation_aliases={},
    layer_types=_full_every(2),
    window=4096,
    scale=_query_scalar,
    softcaps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    neutral={"hidden_act": ("gelu", "gelu_pytorch_tanh"), "sliding_window_size": (4096,)},
)
OLMO2 = Family(layout="post", eps=1e-5, head_norms="whole row", attention_bias=True)

QWEN3 = Family(
    kv_heads_required=True,
    head_size=128,
    attention_bias=True,
    head_norms="each",
    layer_types=_qwen_types,
    window=4096,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(attention_bias=True, mlp_bias=True),
    "mistral": Family(kv_heads_required=True, layer_types=_same_types(4096), window=4096),
    "qwen2": Family(kv_heads_required=True, qkv_bias=True, layer_types=_qwen_types, window=4096),
    "qwen3": QWEN3,
    "qwen3_vl_text": replace(
        QWEN3,
        layer_types=lambda config, layers: [FULL] * layers,
        window=...,
        theta=500_000.0,
        # The positions of a text's tokens are the same in all three directions.
        neutral_rope=("mrope_interleaved", "mrope_section"),
    ),
    "smollm3": Family(
        kv_heads_required=True,
        tied=True,
        attention_bias=True,
        mlp_bias=True,
        layer_types=_smollm3_types,
        window=None,
        theta=2_000_000.0,
        skips_rope=True,
        neutral={"max_window_layers": (28,)},
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA2,
        head_norms="each",
        layer_types=_full_every(6, "sliding_window_pattern"),
        theta=1_000_000.0,
        rope_by_type=RopeByType("rope_local_base_freq", 10_000.0),
        softcaps={"final_logit_softcapping": None},
        neutral={**GEMMA2.neutral, "attn_logit_softcapping": (None,)},
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
        },
    ),
    "granite": Family(
        attention_bias=True,
        mlp_bias=True,
        scale=lambda config, sizes: config.number("attention_multiplier", 1.0),
        multipliers=True,
    ),
    "olmo2": OLMO2,
    "olmo3": replace(
        OLMO2,
        layer_types=_full_every(4),
        window=4096,
        theta=500_000.0,
        rope_by_type=RopeByType(None, 500_000.0),
    ),
    "phi3": Family(
        eps=1e-5,
        fused=True,
        layer_types=_same_types(None),
        window=None,
        partial_rope=True,
        original_len=4096,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
}
"""The families by `model_type`."""

TEXT_PARTS: dict[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral",),
    "qwen3_vl": ("qwen3_vl_text",),
}
"""Model types of images and texts, with those that their part for texts may have."""
