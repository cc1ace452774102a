"""Reads and writes the model of a trained draft, as torch modules: for training, and for accelerators."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.drafter.hidden.card import CONFIG, WEIGHTS, DraftCard, HiddenDraftConfig, HiddenDraftFolder
from services.drafter.hidden.forward import Weights
from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target_parts import as_tensor
from services.drafter.hidden.tensors import HEAD_IDS, draft_tensors
from shared.errors import ModelError
from shared.models.folder import ModelFolder


def load(folder: HiddenDraftFolder, dtype: torch.dtype) -> tuple[HiddenDraft, Tensor]:
    """Return the model, and the ascending ids of the tokens that it can propose. Raises ModelError."""
    found = draft_tensors(folder)
    head_ids = found.pop(HEAD_IDS)
    return model_of(folder.card.model, found, dtype), as_tensor(head_ids)


def model_of(config: HiddenDraftConfig, weights: Weights, dtype: torch.dtype) -> HiddenDraft:
    """Return the model of these weights. Raises ModelError if they are others, or of another shape."""
    model = HiddenDraft(config)
    try:
        model.load_state_dict({name: as_tensor(array) for name, array in weights.items()})
    except RuntimeError as error:
        raise ModelError(f"the weights are not those of the draft: {error}") from error
    # States are divided by `spread` before they are rounded, so it stays in float32.
    spread = model.spread.clone()
    model = model.to(dtype).eval()
    model.spread = spread
    return model


def save(path: Path, model: HiddenDraft, head_ids: Tensor, target: ModelFolder) -> None:
    """Write a trained draft into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    card = DraftCard(model=model.config, target=target.name, vocab_fingerprint=target.vocab_fingerprint)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    tensors["head_ids"] = head_ids.sort().values.to(torch.int32)
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(card.model_dump(), indent=2) + "\n")
