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
from shared.engine.weights import as_matrix
from shared.errors import ModelError
from shared.kernels.finite import require_finite
from shared.models.folder import ModelFolder
from shared.models.weight_files import some_names


def load(folder: HiddenDraftFolder, dtype: torch.dtype) -> tuple[HiddenDraft, Tensor]:
    """Return the model, and the ascending ids of the tokens that it can propose. Raises ModelError."""
    model = HiddenDraft(folder.card.model)
    found = tensors(folder)
    head_ids = found.pop("head_ids")
    model.load_state_dict(found)
    # States are divided by `spread` before they are rounded, so it stays in float32.
    spread = model.spread.clone()
    model = model.to(dtype).eval()
    model.spread = spread
    return model, head_ids


def tensors(folder: HiddenDraftFolder) -> dict[str, Tensor]:
    """Return the weights by name, as they are in the file, and `head_ids` as int64. Raises ModelError if one has no
    place in the model of `config.json`, is missing, or has values that cannot be used."""
    config = folder.card.model
    try:
        found = load_file(folder.path / WEIGHTS)
        if config.layers > len(found):
            raise ValueError(f"{config.layers} layers, and only {len(found)} tensors")
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in HiddenDraft(config).state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in found.items() if name != "head_ids"}
        wrong = {name for name, _ in shapes.items() ^ expected.items()}
        if wrong or "head_ids" not in found:
            raise ValueError(f"unexpected, missing or of another shape: {some_names(wrong) or 'head_ids'}")
        found["head_ids"] = _checked_ids(found["head_ids"], config.vocab_size)
        for name in shapes:
            if not found[name].is_floating_point():
                raise ValueError(f"{name} is of {found[name].dtype}, not of floating-point numbers")
            require_finite(name, as_matrix(found[name]))
        if not bool((found["spread"] > 0).all()):
            raise ValueError("spread, by which states are divided, has values that are not above 0")
    except (OSError, ValueError, SafetensorError, ModelError) as error:
        raise ModelError(
            f"{folder.path / WEIGHTS} does not fit its {CONFIG}: {error}; copy the draft again, or train one with "
            "`wisp draft train`"
        ) from error
    return found


def _checked_ids(head_ids: Tensor, vocab_size: int) -> Tensor:
    """Return the ids as int64. Raises ValueError unless they are ascending token ids."""
    if head_ids.dtype not in (torch.int32, torch.int64) or head_ids.dim() != 1 or not len(head_ids):
        raise ValueError(f"head_ids is {head_ids.dtype} of shape {tuple(head_ids.shape)}, not a list of integers")
    ids = head_ids.long()
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or bool((ids[1:] <= ids[:-1]).any()):
        raise ValueError(f"head_ids are not ascending ids of a vocabulary of {vocab_size}")
    return ids


def save(path: Path, model: HiddenDraft, head_ids: Tensor, target: ModelFolder) -> None:
    """Write a trained draft into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    card = DraftCard(model=model.config, target=target.name, vocab_fingerprint=target.vocab_fingerprint)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    tensors["head_ids"] = head_ids.sort().values.to(torch.int32)
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(card.model_dump(), indent=2) + "\n")
