"""The tiny models of the decoder families as GGUF files, in llama.cpp's names, order of rows and metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_gguf
from safetensors.torch import load_file
from tiny import VOCAB
from tiny_families import FAMILIES, LLAMA3, WINDOW, family
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, Phi3Config

Floats = tiny_gguf.Floats
SCALAR_OF_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
THETAS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    **{
        name: (name.partition("-")[0].replace("mistral", "llama"), FAMILIES[name])
        for name in (
            "llama", "llama-biases", "llama-linear", "llama-yarn", "llama-llama3", "mistral-full", "qwen2", "qwen3",
            "gemma", "granite", "olmo2", "phi3", "phi3-partial", "phi3-long", "phi3-short",
        )
    },
    "gemma2": ("gemma2", family(Gemma2Config, num_hidden_layers=3, attn_logit_softcapping=2.0, **SCALAR_OF_HEADS)),
    "gemma3": (
        "gemma3",
        family(Gemma3TextConfig, num_hidden_layers=7, rope_parameters=THETAS, **SCALAR_OF_HEADS),
    ),
    "phi3-blocks": ("phi3", family(Phi3Config, hidden_size=64, intermediate_size=96)),
}  # fmt: skip
"""Architecture in GGUF, and what saves the model in a folder, by name."""


def write(folder: Path, path: Path, architecture: str, kind: tiny_gguf.Kind = tiny_gguf.Kind.F32) -> Path:
    """Write a saved model as GGUF. kind: type of matrices."""
    config: Any = AutoConfig.from_pretrained(folder)
    writer: Any = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config, architecture)
    add_tokens(writer, VOCAB)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, values in tensors.items():
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        values = values + np.float32(1) if architecture.startswith("gemma") and name.endswith("norm.weight") else values
        if architecture in ("llama", "granite"):
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            values = interleaved(values, heads.get(stored.split(".")[-2], 0))
        of = kind if values.ndim == 2 else tiny_gguf.Kind.F32
        writer.add_tensor(stored, gguf.quantize(values, of), raw_dtype=of)
    for name, factors in _factors(config).items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(values: Floats, heads: int) -> Floats:
    """Return a projection's rows in the order of llama.cpp's `permute`."""
    if not heads:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def add_tokens(writer: Any, count: int) -> None:
    """Add a byte-level vocabulary."""
    letters = sorted(ByteLevel.alphabet())
    control = [f"<|{index}|>" for index in range(count - len(letters) - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*control, *letters, "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.NORMAL] * (count - len(control)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)


def _add_metadata(writer: Any, config: Any, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if head * config.num_attention_heads != config.hidden_size or architecture.startswith("gemma"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
    if getattr(config, "sliding_window", None) and architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _factors(config: Any) -> dict[str, list[float]]:
    """Return the tensors of factors that llama.cpp's conversion makes of a scaled rotary embedding."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    long = LLAMA3["original_max_position_embeddings"] / LLAMA3["low_freq_factor"]
    short = LLAMA3["original_max_position_embeddings"] / LLAMA3["high_freq_factor"]
    found = []
    for index in range(0, config.head_dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (index / config.head_dim)
        smooth = (LLAMA3["original_max_position_embeddings"] / length - LLAMA3["low_freq_factor"]) / (
            LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / LLAMA3["factor"] + smooth)
        found.append(1.0 if length < short else LLAMA3["factor"] if length > long else between)
    return {"rope_freqs.weight": found}
