"""The forward pass by compiled code, for models that a description covers (`families`), on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from shared.engine.views import ViewedBlocks, block_views
from shared.engine.weights import described
from shared.kernels.cache import PackedBatch
from shared.kernels.decoder import Decoder
from shared.models.description import ModelDescription

ARITHMETIC = "wisp-1"
"""Identity of the compiled arithmetic: the same bits on every CPU. It changes with the bits of any result."""
DENSE_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "gguf": "bfloat16"}
"""Format of the weights that are not in blocks, by the engine's dtype."""
KV_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16", "gguf": "bfloat16"}
"""Format of keys and values, by the engine's dtype."""


class CompiledPass(ViewedBlocks):
    """A described model. Its activations are float32 for every format of weights."""

    batch_invariant = True
    arithmetic = ARITHMETIC

    def __init__(self, folder: Path, *, form: str, threads: int, blocks: int) -> None:
        """form: format of the weights. Raises NotDescribed (take `ModulePass`) and ModelError."""
        self.blocks = blocks
        self.model, self._decoder = _load(folder, form, threads, blocks)
        self.vocab_size, self.hidden_size, self.max_len = (
            self.model.vocab_size,
            self.model.hidden_size,
            self.model.max_len,
        )

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return block_views(self._decoder.memory, block)

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, logits = self._decoder.forward(batch, tokens=tokens, wanted=wanted)
        return torch.from_numpy(logits), torch.from_numpy(states)


def _load(folder: Path, form: str, threads: int, blocks: int) -> tuple[ModelDescription, Decoder]:
    options = {"form": DENSE_FORMATS[form], "kv_form": KV_FORMATS[form], "blocks": blocks, "threads": threads}
    with described(folder, form) as (model, weights):
        return model, Decoder.of(model, weights.read, **options)
