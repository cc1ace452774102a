"""Tensors of a model in GGUF, under transformers' names and as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.models.gguf_file import GgufFile, GgufTensor

# GGUF names -> names of transformers' modules.
_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PRE_NORM_BLOCK = {
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
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_PRE_AND_POST_NORMS = {"ffn_norm": "pre_feedforward_layernorm", **_POST_NORMS}


def _without(names: Mapping[str, str], *left_out: str) -> dict[str, str]:
    return {name: module for name, module in names.items() if name not in left_out}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family's tensors as llama.cpp's conversion makes them."""

    model_type: str
    """transformers' name."""
    classes: str
    """transformers' class."""
    block: Mapping[str, str]
    """GGUF's names of a layer's tensors, with transformers' modules."""
    interleaved: bool = False
    """True if the rows of q and k are in llama.cpp's order."""
    norm_offset: float = 0.0
    """Difference between the gains of norms in the file and transformers'."""
    factors: tuple[str, ...] = ()
    """Tensors that are no weights: factors of the rotary embedding."""


ARCHITECTURES: Final = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _PRE_NORM_BLOCK, interleaved=True, factors=("rope_freqs.weight",)
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _PRE_NORM_BLOCK),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_PRE_NORM_BLOCK, **_HEAD_NORMS}),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _PRE_NORM_BLOCK, norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", {**_PRE_NORM_BLOCK, **_PRE_AND_POST_NORMS}, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_PRE_NORM_BLOCK, **_PRE_AND_POST_NORMS, **_HEAD_NORMS},
        norm_offset=1.0,
    ),
    "granite": Architecture("granite", "GraniteForCausalLM", _PRE_NORM_BLOCK, interleaved=True),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        {**_without(_PRE_NORM_BLOCK, "attn_norm", "ffn_norm"), **_POST_NORMS, **_HEAD_NORMS},
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            **_without(_PRE_NORM_BLOCK, "attn_q", "attn_k", "attn_v", "ffn_gate"),
            "attn_qkv": "self_attn.qkv_proj",
            "ffn_up": "mlp.gate_up_proj",
        },
        factors=("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
}
"""The families by `general.architecture`. Mistral's models are of the architecture llama."""


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A tensor of the file."""

    tensor: GgufTensor
    heads: int = 0
    """Number of heads of a q or k projection in llama.cpp's order; 0 for all others."""
    offset: float = 0.0
    """Difference between the file's values and transformers'."""
    first_row: int = 0
    """First of the rows that are meant, in transformers' order."""
    rows: int | None = None
    """Number of these rows; None for all."""

    @property
    def order(self) -> NDArray[np.int64] | slice:
        """Index of the file's rows in transformers' order.

        llama.cpp rotates neighbouring rows of a head, transformers rotates its two halves, so llama.cpp's conversion
        interleaves the halves (`permute` in its convert_hf_to_gguf.py). Blocks run along a row and stay whole.
        """
        last = None if self.rows is None else self.first_row + self.rows
        if not self.heads:
            return slice(self.first_row, last)
        count = self.tensor.shape[0]
        order = np.arange(count).reshape(self.heads, count // self.heads // 2, 2).swapaxes(1, 2).reshape(-1)
        return order[self.first_row : last]

    def part(self, first: int, count: int) -> ModelTensor:
        """Return the tensor of some rows."""
        return replace(self, first_row=first, rows=count)

    def data(self) -> NDArray[np.uint8]:
        """Return the bytes as they are in the file, rows in transformers' order."""
        return self.tensor.data[self.order]

    def values(self) -> NDArray[np.float32]:
        """Return the values as float32, rows in transformers' order."""
        if len(self.tensor.shape) == 1:
            values = self.tensor.values()[self.order]
        else:  # only the rows that are meant are expanded
            values = replace(self.tensor, data=self.data()).values()
        return values - np.float32(self.offset) if self.offset else values


def architecture_of(file: GgufFile) -> Architecture:
    """Return the family of the file's model. Raises ModelError for one that is not known here."""
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path} holds a {name} model; of GGUF files, those of {', '.join(ARCHITECTURES)} can be converted. "
            "Give the model's Hugging Face folder instead."
        )
    return ARCHITECTURES[name]


def model_tensors(file: GgufFile) -> dict[str, ModelTensor]:
    """Return the tensors by transformers' name. Raises ModelError for one that has no place in such a model."""
    architecture, name = architecture_of(file), file.text("general.architecture")
    heads = file.whole(f"{name}.attention.head_count")
    kv_heads = file.whole(f"{name}.attention.head_count_kv", heads)
    split_into = {"attn_q": heads, "attn_k": kv_heads} if architecture.interleaved else {}
    found = {}
    for name, tensor in file.tensors.items():
        stem, _, suffix = name.rpartition(".")
        block, _, part = stem.removeprefix("blk.").partition(".")
        offset = architecture.norm_offset if stem.endswith("norm") else 0.0
        if stem in _TOP_LEVEL:
            found[f"{_TOP_LEVEL[stem]}.{suffix}"] = ModelTensor(tensor, offset=offset)
        elif stem.startswith("blk.") and part in architecture.block:
            split = split_into.get(part, 0)
            if split and tensor.shape[0] % (2 * split):
                raise ModelError(
                    f"{file.path}: the tensor {name} of shape {tensor.shape} has no {split} heads. "
                    "Download the file again."
                )
            found[f"model.layers.{block}.{architecture.block[part]}.{suffix}"] = ModelTensor(tensor, split, offset)
        elif name not in architecture.factors:
            raise ModelError(
                f"{file.path}: the GGUF tensor {name!r} has no place in a {architecture.model_type} model. "
                "Give the model's Hugging Face folder instead."
            )
    return found
