"""Tensors of a Llama model in GGUF, under transformers' names and in transformers' order of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.models.gguf_file import GgufFile, GgufTensor

ARCHITECTURE = "llama"

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


@dataclass(frozen=True, slots=True)
class LlamaTensor:
    """A tensor of the file."""

    tensor: GgufTensor
    heads: int = 0
    """Number of heads of a q or k projection; 0 for all others."""

    @property
    def order(self) -> NDArray[np.int64] | slice:
        """Index of the file's rows in transformers' order.

        llama.cpp rotates neighbouring rows of a head, transformers rotates its two halves, so llama.cpp's conversion
        interleaves the halves (`permute` in its convert_hf_to_gguf.py). Blocks run along a row and stay whole.
        """
        if not self.heads:
            return slice(None)
        rows = self.tensor.shape[0]
        return np.arange(rows).reshape(self.heads, rows // self.heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def data(self) -> NDArray[np.uint8]:
        """Return the bytes, rows in transformers' order."""
        return self.tensor.data[self.order]

    def values(self) -> NDArray[np.float32]:
        """Return the values as float32, rows in transformers' order."""
        return self.tensor.values()[self.order]


def llama_tensors(file: GgufFile) -> dict[str, LlamaTensor]:
    """Return the tensors by transformers' name. Raises ModelError for one that has no place in a Llama model."""
    heads = file.whole("llama.attention.head_count")
    kv_heads = file.whole("llama.attention.head_count_kv", heads)
    split_into = {"attn_q": heads, "attn_k": kv_heads}
    found = {}
    for name, tensor in file.tensors.items():
        stem, _, suffix = name.rpartition(".")
        block, _, part = stem.removeprefix("blk.").partition(".")
        if stem in _TOP_LEVEL:
            found[f"{_TOP_LEVEL[stem]}.{suffix}"] = LlamaTensor(tensor)
        elif stem.startswith("blk.") and part in _BLOCK:
            split = split_into.get(part, 0)
            if split and tensor.shape[0] % (2 * split):
                raise ModelError(
                    f"{file.path}: the tensor {name} of shape {tensor.shape} has no {split} heads. "
                    "Download the file again."
                )
            found[f"model.layers.{block}.{_BLOCK[part]}.{suffix}"] = LlamaTensor(tensor, split)
        else:
            raise ModelError(
                f"{file.path}: the GGUF tensor {name!r} has no place in a Llama model. "
                "Give the model's Hugging Face folder instead."
            )
    return found
