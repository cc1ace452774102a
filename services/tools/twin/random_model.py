"""A model of a given architecture with random weights, for measurements: time does not depend on the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from shared.errors import ModelError

PATTERN = 1 << 16
"""Random numbers that fill the matrices in turn: drawing billions would take minutes."""
SPREAD = 0.02


def random_model(config: Path, to: Path) -> int:
    """Write a folder with the architecture of a config.json and random bfloat16 weights; return their number.

    Raises ModelError if transformers cannot make such a model.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, to / "config.json")
    try:
        made: Any = AutoConfig.from_pretrained(to, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    except Exception as error:  # a model's code can raise anything
        raise ModelError(f"{config}: transformers makes no causal language model of it ({error})") from error
    noise = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).bfloat16()
    tensors, seen = {}, set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in seen:
            continue  # tied to another one
        seen.add(id(weight))
        if weight.dim() < 2:
            tensors[name] = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        else:
            repeats = -(-weight.numel() // PATTERN)
            tensors[name] = noise.repeat(repeats)[: weight.numel()].view(weight.shape).contiguous()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())
