"""Tiny models of every type of transformers that generates text, and their logits."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from shared.engine import Engine, Step

WINDOW = 8
"""Sliding window, and chunk of chunked attention, of the models that have one."""
LENGTH = 256
MOST_WEIGHTS = 5_000_000
"""A model with more is not tiny, and not made."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 96
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), LENGTH),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "local_window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
        ),
        48,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "rotary_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 20,
    "query_pre_attn_scalar": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 0,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Small values by field. A model type takes those that it has."""

SMALL_VISION: dict[str, Any] = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
"""Small values for the part of a model that sees images, which is never used."""

LATENT = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "glm4_moe_lite",
    "youtu",
    "axk1",
    "axk2",
    "minicpm3",
    "mistral4",
    "mistral_large4",
)
"""Types with as many heads of keys as of queries, made from a latent row."""

SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 8, "num_key_value_heads": 4} for kind in LATENT},
    "lfm2": {"layer_types": ["full_attention", "conv"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}
"""Further fields by model type."""


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """Return the tiny configuration of a model type."""
    return _tiny(CONFIG_MAPPING[model_type], options)


def _tiny(kind: type[PreTrainedConfig], options: Mapping[str, Any]) -> PreTrainedConfig:
    default = kind()
    known, parts = default.to_dict(), getattr(kind, "sub_configs", {})
    fields = {name: value for name, value in SMALL.items() if name in known and name not in parts}
    for name in parts:
        part = getattr(default, name, None)
        if name.startswith("text") and isinstance(part, PreTrainedConfig):
            fields[name] = _tiny(type(part), {}).to_dict()
        elif name.startswith("vision") and isinstance(part, PreTrainedConfig):
            fields[name] = {each: value for each, value in SMALL_VISION.items() if each in part.to_dict()}
    return kind(**{**fields, **SPECIAL.get(kind.model_type, {}), **options})


def model_types() -> list[str]:
    """Return the model types of transformers that generate text, without those that need speech."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return sorted({kind.model_type for mapping in mappings for kind in mapping})


def save(folder: Path, model_type: str, **options: Any) -> Path:
    """Save a model with random float32 weights in a folder."""
    config = tiny_config(model_type, **options)
    auto_class = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in auto_class.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"the configuration has {weights:,} weights and is not tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(config).float()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.2)
                else:
                    weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    return folder


def expected_logits(folder: Path, texts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits that transformers itself gives for texts of one length, each alone."""
    config = AutoConfig.from_pretrained(folder)
    auto_class = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = auto_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([text]), use_cache=False).logits for text in texts])


def packed_logits(engine: Engine, texts: Sequence[Sequence[int]], seed: int = 0) -> list[torch.Tensor]:
    """Compute texts in steps of random lengths, with random others in each; return the logits of each."""
    choose, names = random.Random(seed), [f"packed {i}" for i in range(len(texts))]
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    for name in names:
        engine.release(name)
        engine.attach(name, [])
    while pending := [i for i, text in enumerate(texts) if engine.cached(names[i]) < len(text)]:
        chosen = choose.sample(pending, choose.randint(1, len(pending)))
        steps = []
        for i in chosen:
            done = engine.cached(names[i])
            tokens = texts[i][done : done + choose.choice((1, 2, 5, 13, 40))]
            steps.append(Step(names[i], tokens, len(tokens)))
        output = engine.forward(steps)
        for number, i in enumerate(chosen):
            logits[i].append(output.logits[output.rows(number)])
    return [torch.cat(each) for each in logits]


def alone_logits(engine: Engine, text: Sequence[int]) -> torch.Tensor:
    """Compute a text in one step; return its logits. Its prefix is computed anew."""
    engine.reset()
    engine.attach("alone", [])
    return engine.forward([Step("alone", text, len(text))]).logits


def random_texts(count: int, length: int) -> list[list[int]]:
    """Return random tokens, without those that stand for images and other special things."""
    choose = random.Random(5)
    return [[choose.randrange(20, 120) for _ in range(length)] for _ in range(count)]
