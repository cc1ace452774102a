"""Conversion of Llama models in GGUF to a model folder: Hugging Face's configuration files, dense bfloat16 safetensors,
and the GGUF file itself, whose blocks can be computed with as they are. torch is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.models.bfloat16 import nearest_bits
from shared.models.folder import GGUF
from shared.models.gguf_file import GgufFile
from shared.models.gguf_llama import ARCHITECTURE, LlamaTensor, llama_tensors

OnProgress = Callable[[str, float], None]
"""Called with a name of the current activity and its completed share, 0 to 1."""

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
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""GGUF's names of special tokens, by Hugging Face's."""
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def convert_gguf(source: Path, folder: Path, progress: OnProgress) -> None:
    """Write weights, configuration and tokenizer of the GGUF file `source` into the existing `folder`.

    Raises ModelError if the file is no Llama model with a byte-level BPE tokenizer that is known here.
    """
    progress(f"reading {source.name}", 0.0)
    file = GgufFile(source)
    fields = file.fields
    if fields.get("general.architecture") != ARCHITECTURE or fields.get("tokenizer.ggml.model") != "gpt2":
        raise ModelError(
            f"{source} holds a {fields.get('general.architecture')} model with a {fields.get('tokenizer.ggml.model')} "
            "tokenizer; only llama with gpt2 can be converted. Give the model's Hugging Face folder instead."
        )
    if (parts := file.whole("split.count", 0, least=0)) > 1:
        raise ModelError(f"{source} is one of {parts} parts; join them with llama.cpp's gguf-split")
    tensors = llama_tensors(file)
    tied = "lm_head.weight" not in tensors
    _write_json(folder / "config.json", _config(file, tied))
    _write_json(folder / "generation_config.json", _special_ids(file))
    _write_json(folder / "tokenizer.json", _tokenizer(file))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(file))
    _write_weights(folder / "model.safetensors", tensors, progress)
    _link_or_copy(file.path, folder / GGUF)


def _config(file: GgufFile, tied: bool) -> dict[str, Any]:
    heads = file.whole("llama.attention.head_count")
    hidden = file.whole("llama.embedding_length")
    head = file.whole("llama.rope.dimension_count", hidden // heads or None)
    if file.text("llama.rope.scaling.type", "none") != "none" or file.whole("llama.attention.key_length", head) != head:
        raise ModelError(
            "The model's position embedding is scaled or covers a part of each head, which is not converted. "
            "Give the model's Hugging Face folder instead."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_special_ids(file),
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": file.whole("llama.feed_forward_length"),
        "max_position_embeddings": file.whole("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": file.whole("llama.block_count"),
        "num_key_value_heads": file.whole("llama.attention.head_count_kv", heads),
        "pretraining_tp": 1,
        "rms_norm_eps": _shortest(file.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": _shortest(file.number("llama.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": file.whole("llama.vocab_size", len(file.texts("tokenizer.ggml.tokens"))),
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _special_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of the special tokens that the file names, with Hugging Face's keys."""
    return {f"{name}_token_id": token for name, token in _special_tokens(file).items() if name in ("bos", "eos", "pad")}


def _special_tokens(file: GgufFile) -> dict[str, int]:
    """Return the ids of the special tokens that the file names. Raises ModelError for one outside the vocabulary."""
    count, found = len(file.texts("tokenizer.ggml.tokens")), {}
    for name, theirs in _SPECIAL.items():
        if (key := f"tokenizer.ggml.{theirs}_token_id") in file.fields:
            found[name] = file.whole(key, least=0)
            if found[name] >= count:
                raise ModelError(
                    f"{file.path}: the metadata {key} is {found[name]}, and the vocabulary has {count} tokens. "
                    "Download the file again."
                )
    return found


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    pre = file.text("tokenizer.ggml.pre", "")
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"The pre-tokenizer {pre!r} is not known here ({', '.join(_PRE_TOKENIZERS)} is). "
            "Give the model's Hugging Face folder instead."
        )
    tokens, kinds = file.texts("tokenizer.ggml.tokens"), file.wholes("tokenizer.ggml.token_type")
    if len(tokens) != len(kinds):
        raise ModelError(
            f"{file.path} has {len(tokens)} tokens, and types for {len(kinds)} (tokenizer.ggml.token_type). "
            "Download the file again."
        )
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
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
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
            "merges": file.texts("tokenizer.ggml.merges"),
        },
    }


def _tokenizer_config(file: GgufFile) -> dict[str, Any]:
    tokens = file.texts("tokenizer.ggml.tokens")
    special = {f"{name}_token": tokens[index] for name, index in _special_tokens(file).items()}
    template = file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file.fields else None
    return {
        # Takes tokenizer.json as it is; GPT2Tokenizer would rebuild the pre-tokenizer without its digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": file.flag("tokenizer.ggml.add_space_prefix", False),
        **special,
        "additional_special_tokens": [special[name] for name in ("bos_token", "eos_token") if name in special],
        **({} if template is None else {"chat_template": template}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.whole("llama.context_length"),
    }


def _write_weights(path: Path, tensors: Mapping[str, LlamaTensor], progress: OnProgress) -> None:
    def converted() -> Iterator[NDArray[np.uint16]]:
        for done, (name, tensor) in enumerate(tensors.items()):
            progress("converting weights", done / len(tensors))
            yield _bfloat16(name, tensor.values())

    _write_safetensors(path, {name: tensor.tensor.shape for name, tensor in tensors.items()}, converted())
    progress("converting weights", 1.0)


def write_bfloat16(path: Path, tensors: Mapping[str, NDArray[np.uint16]]) -> None:
    """Write bfloat16 tensors, given as their bits, as safetensors."""
    _write_safetensors(path, {name: bits.shape for name, bits in tensors.items()}, iter(tensors.values()))


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], bits: Iterator[NDArray[np.uint16]]) -> None:
    """Write bfloat16 tensors one after the other: header length, JSON header, data.

    NumPy has no bfloat16, so `safetensors.numpy` can't write it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for each in bits:
            file.write(np.ascontiguousarray(each, dtype="<u2").tobytes())


def _link_or_copy(source: Path, target: Path) -> None:
    """Give the file a second name; copy it where that is impossible, as on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _bfloat16(name: str, weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return a tensor's values as bits of bfloat16. Raises ModelError for values that are not finite."""
    if not np.isfinite(weight).all():
        raise ModelError(f"The tensor {name} holds values that are not finite. Install the package again.")
    return nearest_bits(weight)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
