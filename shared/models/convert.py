"""Conversion of Llama models in GGUF to dense bfloat16 safetensors and Hugging Face's configuration files.

Reads GGUF with the `gguf` package; torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError

OnProgress = Callable[[str, float], None]
"""Called with a name of the current activity and its completed share, 0 to 1."""

# GGUF names -> names of transformers' LlamaForCausalLM.
_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF keeps the name of a pre-tokenizer, not its definition.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def convert_gguf(source: Path, folder: Path, progress: OnProgress) -> None:
    """Write weights, configuration and tokenizer of the GGUF file `source` into the existing `folder`.

    Raises ModelError if the file is no Llama model with a byte-level BPE tokenizer that is known here.
    """
    import gguf

    progress(f"reading {source.name}", 0.0)
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} can't be read as GGUF ({error}). Install the package again.") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise ModelError(
            f"{source} holds a {fields.get('general.architecture')} model with a {fields.get('tokenizer.ggml.model')} "
            "tokenizer; only llama with gpt2 can be converted. Give the model's Hugging Face folder instead."
        )
    tied = "output.weight" not in {tensor.name for tensor in reader.tensors}
    _write_json(folder / "config.json", _config(fields, tied))
    _write_json(folder / "generation_config.json", _generation_config(fields))
    _write_json(folder / "tokenizer.json", _tokenizer(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _write_weights(folder / "model.safetensors", reader.tensors, fields, progress)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "pretraining_tp": 1,
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _shortest(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"The pre-tokenizer {pre!r} is not known here ({', '.join(_PRE_TOKENIZERS)} is). "
            "Give the model's Hugging Face folder instead."
        )
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, (token, kind) in enumerate(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # Takes tokenizer.json as it is; GPT2Tokenizer would rebuild the pre-tokenizer without its digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": fields.get("tokenizer.ggml.add_space_prefix", False),
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": [
            tokens[fields["tokenizer.ggml.bos_token_id"]],
            tokens[fields["tokenizer.ggml.eos_token_id"]],
        ],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }


def _write_weights(path: Path, tensors: list[Any], fields: dict[str, Any], progress: OnProgress) -> None:
    dense: dict[str, NDArray[np.uint16]] = {}
    for done, (name, weight) in enumerate(_dense(tensors, fields)):
        progress("converting weights", done / len(tensors))
        dense[name] = _bfloat16(name, weight)
    write_bfloat16(path, dense)
    progress("converting weights", 1.0)


def write_bfloat16(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    """Write bfloat16 tensors, given as their bits, as safetensors: header length, JSON header, data.

    NumPy has no bfloat16, so `safetensors.numpy` can't write it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for bits in tensors.values():
            file.write(np.ascontiguousarray(bits, dtype="<u2").tobytes())


def _dense(tensors: list[Any], fields: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield each tensor with its name in transformers, as float32."""
    import gguf

    heads = {"attn_q": fields["llama.attention.head_count"]}
    heads["attn_k"] = fields.get("llama.attention.head_count_kv", heads["attn_q"])
    for tensor in tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        stem, _, suffix = tensor.name.rpartition(".")
        block, _, part = stem.removeprefix("blk.").partition(".")
        if stem in _TOP_LEVEL:
            yield f"{_TOP_LEVEL[stem]}.{suffix}", weight
        elif stem.startswith("blk.") and part in _BLOCK:
            if part in heads:
                weight = _unpermute(weight, heads[part])
            yield f"model.layers.{block}.{_BLOCK[part]}.{suffix}", weight
        else:
            raise ModelError(
                f"The GGUF tensor {tensor.name!r} has no place in a Llama model. "
                "Give the model's Hugging Face folder instead."
            )


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return the rows of a q or k projection (heads * head_dim, hidden) in transformers' order.

    llama.cpp rotates neighbouring rows of a head, transformers rotates the two halves of it, so llama.cpp's
    conversion interleaves the halves (`permute` in its convert_hf_to_gguf.py); this undoes it.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _bfloat16(name: str, weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 (ties to even) of each value."""
    if not np.isfinite(weight).all():
        raise ModelError(f"The tensor {name} holds values that are not finite. Install the package again.")
    bits = np.ascontiguousarray(weight).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
