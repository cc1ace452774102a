"""Small models trained on the spot, with tokenizers of different kinds and sizes, for measurements of pairs of models.

They speak the language of the texts that they are trained on, badly but alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

BYTE_LEVEL_CONTROLS = ("<|end|>", "<|turn|>")
SENTENCE_PIECE_CONTROLS = ("<unk>", "<s>", "</s>")
CONTEXT = 2048
_LENGTH = 96


def byte_level(folder: Path, texts: Sequence[str], size: int) -> int:
    """Write a byte-level BPE tokenizer trained on texts, as GPT-2's; return the size of its vocabulary."""
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(BYTE_LEVEL_CONTROLS), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _write(folder, backend, BYTE_LEVEL_CONTROLS[0])


def sentence_piece(folder: Path, texts: Sequence[str], size: int) -> int:
    """Write a BPE tokenizer trained on texts with SentencePiece's spelling, as Llama 2's: `▁` for a space, byte
    fallback; return the size of its vocabulary."""
    learned = tokenizers.Tokenizer(BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    controls = list(SENTENCE_PIECE_CONTROLS)
    learned.train_from_iterator(texts, BpeTrainer(vocab_size=size - 256, special_tokens=controls, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    vocab = {token: index for index, token in enumerate(controls)}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=controls[0], byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in controls])
    return _write(folder, backend, controls[2])


def _write(folder: Path, backend: tokenizers.Tokenizer, end: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return backend.get_vocab_size()


def trained(
    folder: Path,
    texts: Sequence[str],
    *,
    hidden: int = 64,
    layers: int = 2,
    steps: int = 200,
    batch: int = 16,
    seed: int = 0,
) -> Path:
    """Write a Llama trained on texts to a folder with a tokenizer; return the folder.

    hidden: size of its states. steps: of `batch` passages of 96 tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    ids: list[int] = []
    for encoding in backend.encode_batch([text + end for text in texts]):
        ids += encoding.ids
    stream = torch.tensor(ids)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=backend.token_to_id(end),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            starts = torch.randint(0, len(stream) - _LENGTH, (batch,))
            passages = torch.stack([stream[start : start + _LENGTH] for start in starts.tolist()])
            loss = model(input_ids=passages, labels=passages).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return folder
