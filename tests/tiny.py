"""Tiny random models made on the spot, for tests that need no language."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from services.drafter.hidden import weights
from services.drafter.hidden.card import HiddenDraftConfig, HiddenDraftFolder
from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target import layer_config
from shared.models.folder import ModelFolder

VOCAB = 512

LLAMA = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    eos_token_id=1,
)
QWEN2 = Qwen2Config(
    vocab_size=VOCAB,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=1024,
)
GPT_NEOX = GPTNeoXConfig(
    vocab_size=VOCAB,
    hidden_size=160,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=1024,
)
MISTRAL = MistralConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=50,
    max_position_embeddings=1024,
)
ARCHITECTURES = {"llama": LLAMA, "qwen2": QWEN2, "gpt-neox": GPT_NEOX, "mistral": MISTRAL}


def make(folder: Path, config: PreTrainedConfig = LLAMA, *, seed: int = 0, noise: float = 0.0) -> Path:
    """A model with random float32 weights in a folder. With noise, each weight is changed by that share of its matrix's
    spread: a draft for the model of the same seed without noise, that agrees with it often but not always."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.2)
            torch.manual_seed(seed + 1)
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * noise * (weight.std() if weight.numel() > 1 else 0))
    model.save_pretrained(folder)
    return folder


def target(folder: Path, config: PreTrainedConfig = LLAMA, *, seed: int = 0) -> ModelFolder:
    """A tiny model with a vocabulary, as a drafter needs it."""
    make(folder, config, seed=seed)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"t{i}": i for i in range(VOCAB)}}}))
    return ModelFolder(folder)


def hidden_draft(
    folder: Path,
    target: ModelFolder,
    *,
    layers: int = 1,
    bottom_layers: int = 1,
    head_ids: Sequence[int] = range(VOCAB),
    seed: int = 0,
) -> HiddenDraftFolder:
    """A draft with random weights, confident and untrained."""
    config = HiddenDraftConfig(
        layer=layer_config(target), layers=layers, bottom_layers=bottom_layers, vocab_size=target.vocab_size
    )
    random = torch.Generator().manual_seed(seed)
    model = HiddenDraft(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.2 + (weight.dim() == 1))
        model.norm.weight.mul_(6)
        model.spread.copy_(torch.rand(model.spread.shape, generator=random) + 0.5)
    weights.save(folder, model, torch.tensor(head_ids), target)
    return HiddenDraftFolder.open(folder)
