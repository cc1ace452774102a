"""A GGUF file's metadata as Hugging Face's `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from shared.errors import ModelError
from shared.models.gguf_file import GgufFile
from shared.models.gguf_tensors import architecture_of

_OTHER_SOURCE = "Give the model's Hugging Face folder instead."
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""GGUF's names of special tokens, by Hugging Face's."""
_ENDS_OF_TURN = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"})
"""Control tokens that end an answer, beside the file's end of text. llama.cpp knows them by their text, too."""
CONTROL_TOKEN: Final = 3
"""llama.cpp's LLAMA_TOKEN_TYPE_CONTROL."""
_NEUTRAL = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.finetuned": (True, False),
}
"""Values that change nothing, by key."""


def config_of(file: GgufFile, tied: bool) -> dict[str, Any]:
    """Return config.json. tied: the head is the embedding. Raises ModelError for metadata that it cannot say."""
    architecture, values = architecture_of(file), _Metadata(file)
    heads = values.whole("attention.head_count")
    hidden = values.whole("embedding_length")
    head = values.whole("attention.key_length", values.whole("rope.dimension_count", hidden // heads or None))
    if architecture.model_type == "phi3":  # a part of each head may be rotated
        head = hidden // heads
    rotated = values.whole("rope.dimension_count", head)
    content = {
        "architectures": [architecture.classes],
        "model_type": architecture.model_type,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "attention_dropout": 0.0,
        **special_ids(file),
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": values.whole("feed_forward_length"),
        "max_position_embeddings": values.whole("context_length"),
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "num_attention_heads": heads,
        "num_hidden_layers": values.whole("block_count"),
        "num_key_value_heads": values.whole("attention.head_count_kv", heads),
        "pretraining_tp": 1,
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": _scaling(file, values, rotated // 2),
        "rope_theta": values.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": values.whole("vocab_size", _rows(file, "token_embd.weight")),
        **(_OPTIONS[architecture.model_type](values) if architecture.model_type in _OPTIONS else {}),
    }
    if values.whole("attention.value_length", head) != head:
        raise ModelError(f"{file.path}: keys and values have different sizes, which is not converted. {_OTHER_SOURCE}")
    if rotated != head and architecture.model_type != "phi3":
        raise ModelError(
            f"{file.path}: the position embedding covers a part of each head, which is not converted. {_OTHER_SOURCE}"
        )
    if rotated != head:
        content["partial_rotary_factor"] = rotated / head
    values.refuse_unread()
    return content


def special_ids(file: GgufFile) -> dict[str, Any]:
    """Return the ids of the special tokens that the file names, with Hugging Face's keys. Several tokens may end a
    text."""
    found: dict[str, Any] = {
        f"{name}_token_id": token for name, token in special_tokens(file).items() if name in ("bos", "eos", "pad")
    }
    ends = [found["eos_token_id"]] if "eos_token_id" in found else []
    named = zip(file.texts("tokenizer.ggml.tokens"), file.wholes("tokenizer.ggml.token_type"), strict=False)
    ends += [index for index, (token, kind) in enumerate(named) if kind == CONTROL_TOKEN and token in _ENDS_OF_TURN]
    ends += [_token(file, f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom") if _has(file, name)]
    if ends := list(dict.fromkeys(ends)):
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found


def special_tokens(file: GgufFile) -> dict[str, int]:
    """Return the ids of the special tokens that the file names. Raises ModelError for one outside the vocabulary."""
    return {
        name: _token(file, f"tokenizer.ggml.{theirs}_token_id")
        for name, theirs in _SPECIAL.items()
        if _has(file, theirs)
    }


def _has(file: GgufFile, name: str) -> bool:
    return f"tokenizer.ggml.{name}_token_id" in file.fields


def _token(file: GgufFile, key: str) -> int:
    token, count = file.whole(key, least=0), len(file.texts("tokenizer.ggml.tokens"))
    if token >= count:
        raise ModelError(
            f"{file.path}: the metadata {key} is {token}, and the vocabulary has {count} tokens. "
            "Download the file again."
        )
    return token


class _Metadata:
    """The metadata of the file's architecture, by their keys without its name."""

    def __init__(self, file: GgufFile) -> None:
        self._file, self._name = file, file.text("general.architecture")
        self._read = set(_NEUTRAL)

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        return self._file.whole(self._key(key), default, least=least)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
        return float(str(np.float32(self._file.number(self._key(key), default))))

    def text(self, key: str, default: str) -> str:
        return self._file.text(self._key(key), default)

    def has(self, key: str) -> bool:
        return self._key(key) in self._file.fields

    def _key(self, key: str) -> str:
        self._read.add(key)
        return f"{self._name}.{key}"

    def refuse_unread(self) -> None:
        """Raise ModelError if the file has metadata of its architecture that nothing has read, or that is not
        neutral."""
        for full, value in self._file.fields.items():
            key = full.removeprefix(f"{self._name}.")
            if key == full or (key in self._read and value in _NEUTRAL.get(key, (value,))):
                continue
            raise ModelError(
                f"{self._file.path}: the metadata {full} ({str(value)[:40]}) is not known here, and may change what "
                f"the model computes. {_OTHER_SOURCE}"
            )


def _scaling(file: GgufFile, values: _Metadata, pairs: int) -> dict[str, Any] | None:
    """Return `rope_scaling`. pairs: those of a head's elements that are rotated."""
    kind = values.text("rope.scaling.type", "none")
    factors = {name: _factors(file, name, pairs) for name in architecture_of(file).factors if name in file.tensors}
    if "rope_freqs.weight" in factors:  # Llama 3's, for any length
        each = factors["rope_freqs.weight"]
        return {
            "rope_type": "longrope",
            "short_factor": each,
            "long_factor": each,
            "factor": 1.0,
            "attention_factor": 1.0,
        }
    if factors:
        names = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
        if missing := sorted(set(names.values()) - factors.keys()):
            raise ModelError(f"{file.path} has no tensor {missing[0]}. Download the file again.")
        given = {"attention_factor": values.number("rope.scaling.attn_factor")} if values.has(_ATTENTION) else {}
        return {"rope_type": "longrope", **{name: factors[tensor] for name, tensor in names.items()}, **given}
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": values.number("rope.scaling.factor")}
    if kind == "yarn":
        original = values.whole("rope.scaling.original_context_length")
        factor = values.number("rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelError(
        f"{file.path}: the position embedding is scaled by {kind!r}, which is not converted. {_OTHER_SOURCE}"
    )


_ATTENTION = "rope.scaling.attn_factor"


def _factors(file: GgufFile, name: str, count: int) -> list[float]:
    if (shape := file.tensors[name].shape) != (count,):
        raise ModelError(
            f"{file.path}: the tensor {name} of shape {shape} has no {count} factors. Download the file again."
        )
    factors = file.tensors[name].values()
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{file.path}: the tensor {name} holds no factors. Download the file again.")
    return [float(factor) for factor in factors]


def _rows(file: GgufFile, tensor: str) -> int | None:
    return file.tensors[tensor].shape[0] if tensor in file.tensors else None


def _gemma(values: _Metadata) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _with_windows(values: _Metadata, layers_of_27b: int) -> dict[str, Any]:
    """Options of Gemma 2 and 3. GGUF lacks the scale of attention scores: llama.cpp knows the model of 27B, whose scale
    is not that of its heads, by its layers."""
    heads, hidden = values.whole("attention.head_count"), values.whole("embedding_length")
    is_27b = values.whole("block_count") == layers_of_27b
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if is_27b else values.whole("attention.key_length", hidden // heads),
        "sliding_window": values.whole("attention.sliding_window"),
    }


def _gemma2(values: _Metadata) -> dict[str, Any]:
    return _with_windows(values, 46) | {
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0),
    }


def _gemma3(values: _Metadata) -> dict[str, Any]:
    softcap = values.number("final_logit_softcapping") if values.has("final_logit_softcapping") else None
    return _with_windows(values, 62) | {
        "final_logit_softcapping": softcap,
        "rope_theta": values.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": values.number("rope.freq_base_swa", 10_000.0),
        "sliding_window_pattern": values.whole("attention.sliding_window_pattern", 6),
    }


def _granite(values: _Metadata) -> dict[str, Any]:
    return {
        "attention_multiplier": values.number("attention.scale"),
        "embedding_multiplier": values.number("embedding_scale", 1.0),
        "logits_scaling": values.number("logit_scale", 1.0),
        "residual_multiplier": values.number("residual_scale", 1.0),
    }


def _phi3(values: _Metadata) -> dict[str, Any]:
    window = values.whole("attention.sliding_window", 0, least=0)
    original = values.whole("rope.scaling.original_context_length", values.whole("context_length"))
    return {"sliding_window": window or None, "original_max_position_embeddings": original}


_OPTIONS: dict[str, Callable[[_Metadata], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "granite": _granite,
    "phi3": _phi3,
}
