"""Values of transformers' modules that depend on positions, made to depend on a token's own position only.

Two kinds of rotary embedding are defined by the length of a session, for which transformers takes the largest position
of the whole batch: one session would change another's results, and a session's cached keys would not fit its later
ones. As in the compiled pass (`shared.models.rope`), the model's maximum length decides instead: longrope has its long
factors if it exceeds the original length, and dynamic has the frequencies of lengths up to it, which are the unscaled
ones.

Llama 4 scales queries of some layers by the position, for which transformers takes the row in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

QUERY_TUNING = "wisp_query_tuning"
"""Attribute of the attentions whose queries are scaled by the position."""


@dataclass(frozen=True, slots=True)
class QueryTuning:
    """Factors of queries that grow with the position (arXiv 2501.19399)."""

    floor_scale: float
    attn_scale: float

    def factors(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((positions.float() + 1) / self.floor_scale)) * self.attn_scale + 1


def fix_positions(model: torch.nn.Module, max_len: int) -> None:
    """Fix the frequencies of every rotation that would change them during a pass, and the places of scaled queries."""
    for module in model.modules():
        options: Any = module
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale"):
            options.attn_temperature_tuning = False  # the attention function does it
            if not options.use_rope:
                setattr(module, QUERY_TUNING, QueryTuning(options.floor_scale, options.attn_scale))
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = _fixed(module, kinds, None, max_len)  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            module.rope_type = {  # type: ignore[assignment]
                layer_type: _fixed(module, kind, layer_type, max_len) for layer_type, kind in kinds.items()
            }


def _fixed(module: torch.nn.Module, kind: str, layer_type: str | None, max_len: int) -> str:
    """Set the frequencies of one kind of rotation and return the type that leaves them as they are."""
    if kind == "longrope":
        config: Any = module.config
        prefix = f"{layer_type}_" if layer_type else ""
        parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
        original = parameters["original_max_position_embeddings"]
        if max_len > original:
            options = {"layer_type": layer_type} if layer_type else {}
            frequencies: Any = getattr(module, f"{prefix}inv_freq")
            long, _scale = ROPE_INIT_FUNCTIONS[kind](config, frequencies.device, seq_len=original + 1, **options)
            frequencies.copy_(long)
    return "default" if kind == "longrope" or "dynamic" in kind else kind
