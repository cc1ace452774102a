"""A draft model with random weights and the target's vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_draft(folder: Path, target: Path) -> Path:
    """Write the model into `folder`, with the target's tokenizer, and return `folder`."""
    torch.manual_seed(1)
    known = json.loads((target / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=known["vocab_size"],
        max_position_embeddings=known["max_position_embeddings"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / name, folder / name)
    return folder
