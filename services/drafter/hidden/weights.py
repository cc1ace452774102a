"""Reads and writes the weights of a trained draft."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.drafter.hidden.card import CONFIG, WEIGHTS, DraftCard, HiddenDraftFolder
from services.drafter.hidden.model import HiddenDraft
from shared.errors import ModelError
from shared.models.folder import ModelFolder


def load(folder: HiddenDraftFolder, dtype: torch.dtype) -> tuple[HiddenDraft, Tensor]:
    """Return the model, and the ascending ids of the tokens that it can propose. Raises ModelError."""
    model = HiddenDraft(folder.card.model)
    found = tensors(folder)
    head_ids = found.pop("head_ids").long()
    model.load_state_dict(found)
    # States are divided by `spread` before they are rounded, so it stays in float32.
    spread = model.spread.clone()
    model = model.to(dtype).eval()
    model.spread = spread
    return model, head_ids


def tensors(folder: HiddenDraftFolder) -> dict[str, Tensor]:
    """Return the weights and `head_ids` by name, as they are in the file. Raises ModelError if one has no place in the
    model of `config.json`, or is missing."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in HiddenDraft(folder.card.model).state_dict().items()}
    try:
        found = load_file(folder.path / WEIGHTS)
        shapes = {name: tensor.shape for name, tensor in found.items() if name != "head_ids"}
        wrong = sorted({name for name, _ in shapes.items() ^ expected.items()})
        if wrong or "head_ids" not in found:
            raise ValueError(f"unexpected, missing or of another shape: {', '.join(wrong) or 'head_ids'}")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder.path / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    return found


def save(path: Path, model: HiddenDraft, head_ids: Tensor, target: ModelFolder) -> None:
    """Write a trained draft into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    card = DraftCard(model=model.config, target=target.name, vocab_fingerprint=target.vocab_fingerprint)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    tensors["head_ids"] = head_ids.sort().values.to(torch.int32)
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(card.model_dump(), indent=2) + "\n")
