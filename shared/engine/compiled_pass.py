"""The forward pass by compiled code, for models that a description covers (`families`), on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from shared.engine.views import block_views
from shared.errors import ModelError
from shared.kernels.cache import PackedBatch
from shared.kernels.decoder import Decoder, Matrix
from shared.models.description import ModelDescription, NotDescribed, WeightName
from shared.models.families import describe

ARITHMETIC = "wisp-1"
"""Identity of the compiled arithmetic: the same bits on every CPU. It changes with the bits of any result."""
KV_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}
"""Format of keys and values by format of the weights."""


class CompiledPass:
    """A described model. Its activations are float32 for every format of weights."""

    batch_invariant = True
    arithmetic = ARITHMETIC

    def __init__(self, folder: Path, *, form: str, threads: int, blocks: int) -> None:
        """form: format of the weights. Raises NotDescribed (take `ModulePass`) and ModelError."""
        self.model, self._decoder = _load(folder, form, threads, blocks)
        self.vocab_size, self.hidden_size, self.max_len = (
            self.model.vocab_size,
            self.model.hidden_size,
            self.model.max_len,
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._decoder.weight_bytes

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return block_views(self._decoder.memory, block)

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, logits = self._decoder.forward(batch, tokens=tokens, wanted=wanted)
        return torch.from_numpy(logits), torch.from_numpy(states)


def _load(folder: Path, form: str, threads: int, blocks: int) -> tuple[ModelDescription, Decoder]:
    paths = sorted(folder.glob("*.safetensors"))
    with ExitStack() as stack:
        try:
            config = json.loads((folder / "config.json").read_bytes())
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{folder} cannot be read ({error}); download the model again") from error
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a file is no mapping
        model = describe(config, where)

        def read(weight: WeightName) -> Matrix:
            tensor = where[weight.name].get_tensor(weight.name)
            if weight.rows is not None:
                tensor = tensor[weight.first_row : weight.first_row + weight.rows]
            return as_matrix(tensor)

        return model, Decoder.of(model, read, form=form, kv_form=KV_FORMATS[form], blocks=blocks, threads=threads)


def as_matrix(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's bits of bfloat16 (uint16), or its values as float32."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.float().contiguous().numpy()


__all__ = ["ARITHMETIC", "CompiledPass", "NotDescribed", "as_matrix"]
