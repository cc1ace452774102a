"""Model folders made on the spot, with tokenizers small enough to read; their weights are not meant to be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

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


def write_folder(path: Path, backend: tokenizers.Tokenizer, template: str | None = CHATML, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    facts = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 64, "eos_token_id": 1, **config}
    (path / "config.json").write_text(json.dumps(facts))
    tokenizer_config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (path / "model.safetensors").write_bytes(b"weights")
    return path
