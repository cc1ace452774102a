"""Model folders made on the spot, with tokenizers small enough to read; their weights are not meant to be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from shared.models.convert import write_bfloat16

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "☃"]


def byte_level(merges: int = 300) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(SPECIAL) + merges, initial_alphabet=alphabet, special_tokens=SPECIAL
    )
    backend.train_from_iterator(["Ein naïver Größenwahn, 漢字かな交じり文 🙂🙃🙂 the theme then there"] * 3, trainer)
    backend.add_tokens(["<tool>", "zwölf"])
    return backend


def sentence_piece() -> tokenizers.Tokenizer:
    pieces = ["<unk>", *SPECIAL[:2], *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "b", "é", "漢"]
    backend = tokenizers.Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL[:2])
    return backend


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
"""A configuration that the compiled pass covers, for `write_llama`."""


def write_llama(path: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    """Write a folder with the weights, all zero, of a tiny Llama."""
    write_folder(path, backend, **{**LLAMA, **config})
    layer, hidden = "model.layers.0", LLAMA["hidden_size"]
    shapes = {
        "model.embed_tokens.weight": (backend.get_vocab_size(), hidden),
        "model.norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.k_proj.weight": (hidden // 2, hidden),
        f"{layer}.self_attn.v_proj.weight": (hidden // 2, hidden),
        **{f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"},
        **{f"{layer}.mlp.{name}_proj.weight": (hidden, hidden) for name in ("gate", "up", "down")},
    }
    write_bfloat16(path / "model.safetensors", {name: np.zeros(shape, np.uint16) for name, shape in shapes.items()})
    return path


def write_folder(path: Path, backend: tokenizers.Tokenizer, template: str | None = CHATML, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    facts = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 64, "eos_token_id": 1, **config}
    (path / "config.json").write_text(json.dumps(facts))
    tokenizer_config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (path / "model.safetensors").write_bytes(b"weights")
    return path
