"""The forward pass by transformers' module code: for models and devices that the compiled pass does not cover."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from shared.engine.attention import BlockCache, Cache, GatherCache, Probe
from shared.engine.invariance import CANDIDATES, row_multiple
from shared.engine.loading import load
from shared.kernels.cache import PackedBatch, positions_of


class ModulePass:
    """A model of transformers. Rows are padded so that matrix products have the same bits for any number of rows, where
    that is possible (`invariance`)."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, threads: int, blocks: int) -> None:
        """Raises ModelError."""
        self._device = device
        self._model = load(folder, dtype).to(device)
        config = self._model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_len: int = config.max_position_embeddings
        self.arithmetic = module_arithmetic(device, dtype)
        multiple = row_multiple(self._model) if device.type == "cpu" else None
        self.batch_invariant = multiple is not None
        self._row_multiple = multiple or max(CANDIDATES)
        # The hook holds the list, not this object: a cycle would keep a dropped model's weights in memory.
        self._states: list[torch.Tensor] = []
        keep = self._states.append
        self._model.base_model.register_forward_hook(lambda _module, _inputs, output: keep(output[0]))
        self._cache = self._make_cache(dtype, threads, blocks)

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return self._cache.views(block)

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._cache.begin(batch)
        padding = [0] * (-len(tokens) % self._row_multiple)
        logits, states = self._run(self._cache, [*tokens, *padding], [*positions_of(batch).tolist(), *padding], wanted)
        return logits, states[: len(tokens)]

    def _run(
        self, cache: Cache | Probe, tokens: list[int], positions: list[int], wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the packed row through the model; return logits of the wanted rows and final hidden states of all."""
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([tokens], device=self._device),
            "position_ids": torch.tensor([positions], device=self._device),
            "use_cache": False,
            "cache": cache,
        }
        if wanted:
            rows = torch.tensor([*wanted, *([0] * (-len(wanted) % self._row_multiple))], device=self._device)
            logits = self._model(**inputs, logits_to_keep=rows).logits[0, : len(wanted)]
        else:
            self._model.base_model(**inputs)
            logits = torch.empty(0, self.vocab_size, dtype=self._model.dtype, device=self._device)
        states = self._states[-1][0]
        self._states.clear()
        return logits, states

    @torch.inference_mode()
    def _make_cache(self, dtype: torch.dtype, threads: int, blocks: int) -> Cache:
        probe = Probe()
        self._run(probe, [0] * self._row_multiple, [0] * self._row_multiple, [0])
        if self._device.type == "cpu":
            return BlockCache(probe.shape(), blocks, dtype, threads)
        return GatherCache(probe.shape(), blocks, dtype, self._device)


def module_arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """Name the arithmetic of transformers' module code: the libraries and the kind of device.

    On the CPU, torch and its libraries choose kernels by instruction set and by the maker of the CPU. The number of
    threads changes no bits.
    """
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        kind = [torch.backends.cpu.get_cpu_capability()]
        if dtype is torch.bfloat16:
            kind += sorted(name for name, present in found.items() if name.endswith("bf16") and present)
        kind += str(found.get("cpu_name", "")).split()[:1]
    else:
        kind = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{libraries}, {' '.join((device.type, *kind))}"
