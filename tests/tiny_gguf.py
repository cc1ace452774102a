"""Tiny Llama models in GGUF, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

VOCAB = 320
HEADS, KV_HEADS, HEAD, HIDDEN, WIDTH, LAYERS = 4, 2, 16, 64, 96, 2
Kind = gguf.GGMLQuantizationType
Floats = NDArray[np.float32]


def mixed(name: str) -> Kind:
    """Every block type that the kernels have, as q, k and v of two types too."""
    if "norm" in name:
        return Kind.F32
    part = name.rpartition(".")[0].rpartition(".")[2]
    return {"token_embd": Kind.Q8_0, "attn_v": Kind.Q8_0, "ffn_gate": Kind.Q4_0, "ffn_up": Kind.Q4_0}.get(
        part, Kind.Q4_1
    )


def tensors(seed: int = 0) -> dict[str, Floats]:
    """Random weights by GGUF's names, q and k in llama.cpp's order of rows."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "attn_q": (HEADS * HEAD, HIDDEN),
                "attn_k": (KV_HEADS * HEAD, HIDDEN),
                "attn_v": (KV_HEADS * HEAD, HIDDEN),
                "attn_output": (HIDDEN, HEADS * HEAD),
                "ffn_norm": (HIDDEN,),
                "ffn_gate": (WIDTH, HIDDEN),
                "ffn_up": (WIDTH, HIDDEN),
                "ffn_down": (HIDDEN, WIDTH),
            }.items()
        }
    return {f"{name}.weight": random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    weights: Mapping[str, Floats] | None = None,
    kind: Callable[[str], Kind] = mixed,
    *,
    architecture: str = "llama",
    changes: Mapping[str, Any] | None = None,
    added: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Write a model. kind: returns the type of a tensor. fields: settings of the architecture, by name. changes: other
    values of metadata by their whole key, None for none. added: further metadata."""
    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = sorted(ByteLevel.alphabet())
    control = [f"<|{index}|>" for index in range(VOCAB - len(letters) - 1)]
    writer.add_token_list([*control, *letters, "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.NORMAL] * (VOCAB - len(control)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name, value in fields.items():
        writer.add_string(f"{architecture}.{name}", value)
    for key, value in (changes or {}).items():
        del writer.kv_data[0][key]
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for key, value in (added or {}).items():
        of = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, of)
    for name, weight in (tensors() if weights is None else weights).items():
        writer.add_tensor(name, gguf.quantize(weight, kind(name)), raw_dtype=kind(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
