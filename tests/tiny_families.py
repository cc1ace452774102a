"""Tiny random models of every decoder family that has a description, and of every option of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    SmolLM3Config,
)

WINDOW = 8
"""Sliding window of the models that have one."""

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.25, 1.5, 1.75, 2.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0],
}


def _make(folder: Path, *, kind: type[PreTrainedConfig], old: dict[str, Any] | None, options: dict[str, Any]) -> Path:
    """Save a model with random float32 weights, norms and biases included. old: what an older version of transformers
    saved instead of `rope_parameters`."""
    _save(folder, AutoModelForCausalLM, kind(**copy.deepcopy({**SIZES, **options})))
    if old is not None:
        path = folder / "config.json"
        saved = json.loads(path.read_text())
        del saved["rope_parameters"]
        path.write_text(json.dumps(saved | old))
    return folder


def _make_text_part(
    folder: Path, *, kind: type[PreTrainedConfig], text: dict[str, Any], options: dict[str, Any], newer: bool
) -> Path:
    """Save a model of images and texts. newer: with the names that transformers' modules have, instead of those that
    folders have had since before."""
    config = kind(text_config={**SIZES, **text}, **copy.deepcopy(options))
    _save(folder, AutoModelForImageTextToText, config)
    if newer:
        path = folder / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(path).items():
            plain = f"model.{name}".replace("model.language_model.model.", "model.language_model.")
            tensors[plain.replace("model.language_model.lm_head.", "lm_head.")] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _save(folder: Path, auto_class: Any, config: PreTrainedConfig) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(config).float()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias") or weight.dim() > 1:
                    weight.normal_(0, 0.2)
                else:
                    weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)


def _text_part(
    kind: type[PreTrainedConfig], text: dict[str, Any], *, newer: bool = False, **options: Any
) -> Callable[[Path], Path]:
    return partial(_make_text_part, kind=kind, text=text, options=options, newer=newer)


def family(kind: type[PreTrainedConfig], old: dict[str, Any] | None = None, **options: Any) -> Callable[[Path], Path]:
    return partial(_make, kind=kind, old=old, options=options)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA3_TEXT = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "layer_types": TYPES,
}

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": family(LlamaConfig),
    "llama-biases": family(LlamaConfig, attention_bias=True, mlp_bias=True, head_dim=20, tie_word_embeddings=True),
    "llama-gelu": family(LlamaConfig, hidden_act="gelu"),
    "llama-old": family(LlamaConfig, {"rope_theta": 500.0, "rope_scaling": None}),
    "llama-linear": family(LlamaConfig, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}),
    "llama-linear-old": family(LlamaConfig, {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-dynamic": family(LlamaConfig, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
    "llama-yarn": family(LlamaConfig, rope_parameters=YARN),
    "llama-yarn-options": family(
        LlamaConfig, rope_parameters={**YARN, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16}
    ),
    "llama-yarn-old": family(LlamaConfig, {"rope_scaling": {"type": "yarn", "factor": 8.0}}),
    "llama-llama3": family(LlamaConfig, rope_parameters={**LLAMA3, "rope_theta": 500.0}, head_dim=16),
    "llama-llama3-old": family(LlamaConfig, {"rope_theta": 500.0, "rope_scaling": LLAMA3}, head_dim=16),
    "mistral": family(MistralConfig, sliding_window=WINDOW, head_dim=24),
    "mistral-full": family(MistralConfig, sliding_window=None),
    "qwen2": family(Qwen2Config, tie_word_embeddings=True),
    "qwen2-windows": family(
        Qwen2Config, num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": family(Qwen3Config, head_dim=32, attention_bias=True),
    "qwen3-windows": family(
        Qwen3Config,
        num_hidden_layers=4,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=TYPES,
    ),
    "smollm3": family(SmolLM3Config, num_hidden_layers=4, attention_bias=True, mlp_bias=True),
    "smollm3-windows": family(
        SmolLM3Config,
        num_hidden_layers=4,
        no_rope_layers=[1, 0, 0, 1],
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "gemma": family(GemmaConfig, head_dim=16),
    "gemma-old": family(
        GemmaConfig,
        {"rope_theta": 500.0, "hidden_act": "gelu", "hidden_activation": None},
        head_dim=16,
        attention_bias=True,
    ),
    "gemma2": family(
        Gemma2Config,
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma2-no-caps": family(
        Gemma2Config,
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    ),
    "gemma3": family(
        Gemma3TextConfig,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=TYPES,
        final_logit_softcapping=5.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma3-old": family(
        Gemma3TextConfig,
        {
            "rope_theta": 1_000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": None,
            "sliding_window_pattern": 2,
        },
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma3-text-part": _text_part(Gemma3Config, GEMMA3_TEXT, vision_config=VISION, image_token_index=3),
    "gemma3-text-part-new": _text_part(
        Gemma3Config, GEMMA3_TEXT, vision_config=VISION, image_token_index=3, newer=True
    ),
    "mistral3-text-part": _text_part(
        Mistral3Config,
        {"model_type": "mistral", "sliding_window": None},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        image_token_index=3,
    ),
    "mistral3-text-part-new": _text_part(
        Mistral3Config,
        {"model_type": "mistral", "sliding_window": None},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        image_token_index=3,
        newer=True,
    ),
    "qwen3-vl-text-part": _text_part(
        Qwen3VLConfig,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 48},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    ),
    "granite": family(
        GraniteConfig,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=3.0,
        attention_multiplier=0.1,
        tie_word_embeddings=True,
    ),
    "granite-biases": family(GraniteConfig, attention_bias=True, mlp_bias=True, attention_multiplier=0.1),
    "olmo2": family(Olmo2Config, attention_bias=True),
    "olmo3": family(
        Olmo3Config,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "olmo3-old": family(
        Olmo3Config,
        {"rope_theta": 500_000.0, "rope_scaling": {**YARN, "rope_theta": 500_000.0}},
        num_hidden_layers=4,
        sliding_window=WINDOW,
    ),
    "phi3": family(Phi3Config),
    "phi3-partial": family(
        Phi3Config,
        num_key_value_heads=1,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "phi3-long": family(Phi3Config, original_max_position_embeddings=16, rope_parameters={**LONGROPE}),
    "phi3-short": family(Phi3Config, original_max_position_embeddings=1024, rope_parameters={**LONGROPE}),
    "phi3-long-old": family(
        Phi3Config,
        {
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0, 3.0], "long_factor": [1.0, 4.0, 16.0]},
        },
    ),
}
"""By name, functions that save the model in a folder and return the folder."""
