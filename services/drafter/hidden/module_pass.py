"""The draft model's forward pass by torch's modules: for devices that the compiled pass does not cover."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.forward import Floats, Weights
from services.drafter.hidden.model import run_layers
from services.drafter.hidden.target import require_first_layers
from services.drafter.hidden.target_parts import target_parts
from services.drafter.hidden.weights import load, model_of
from shared.engine.attention import GatherCache
from shared.engine.engine import DTYPES
from shared.engine.forward import usable
from shared.kernels.cache import KvShape, PackedBatch, ScoreOptions, positions_of
from shared.models.folder import ModelFolder


class ModuleDraft:
    """The modules that training computes with, and a KV cache."""

    def __init__(
        self, draft: HiddenDraftFolder, target: ModelFolder, *, dtype: str, torch_device: str, blocks: int
    ) -> None:
        """Raises ModelError and EngineError."""
        config = draft.card.model
        self._torch_device = usable(torch_device)
        require_first_layers(target, config.bottom_layers)
        parts = target_parts(target, config.bottom_layers, DTYPES[dtype])
        self._dtype = DTYPES[dtype]
        model, head_ids = load(draft, self._dtype)
        self.head_ids = head_ids.numpy()
        self._model = model.to(torch_device)
        self._bottom = parts.bottom.to(torch_device)
        # Rows are gathered from the mapped file, so the whole embedding is never held in memory.
        self._embedding = parts.embedding
        self._logits = parts.logits
        self._head = parts.head[head_ids].contiguous().to(torch_device)
        layer = config.layer
        self._scores = ScoreOptions(layer.head_size**-0.5)
        shape = KvShape(config.bottom_layers + config.layers, layer.kv_heads, layer.heads, layer.head_size)
        self._cache = GatherCache(shape, blocks, DTYPES[dtype], self._torch_device)

    @torch.inference_mode()
    def forward(self, tokens: list[int], before: Floats, batch: PackedBatch) -> Floats:
        positions = torch.from_numpy(positions_of(batch)).to(self._torch_device)
        embedded = self._embedding[torch.tensor(tokens)].to(self._torch_device)
        self._cache.begin(batch)
        bottom = None
        if self._bottom:
            bottom = run_layers(list(self._bottom), embedded, positions, self._attend)  # type: ignore[arg-type]
        u = self._model.inputs(self._model.known(embedded, bottom), torch.from_numpy(before).to(self._torch_device))
        layers = list(self._model.layers)
        g = run_layers(layers, u, positions, self._attend, len(self._bottom))  # type: ignore[arg-type]
        last = torch.tensor(batch.counts).cumsum(0) - 1
        return _array(self._model.norm(g[last.to(self._torch_device)]))

    def copy_block(self, source: int, target: int) -> None:
        for there, here in zip(self._cache.views(source), self._cache.views(target), strict=True):
            here.copy_(there)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._cache.attend(layer, q, k, v, self._scores)

    @torch.inference_mode()
    def logits(self, estimates: Floats) -> Floats:
        states = torch.from_numpy(estimates).to(self._torch_device, self._head.dtype)
        return self._logits.applied(_array(functional.linear(states, self._head)))

    def replacement(self, weights: Weights) -> Callable[[], None]:
        made = model_of(self._model.config, weights, self._dtype).to(self._torch_device)

        def replace() -> None:
            self._model = made

        return replace


def _array(tensor: Tensor) -> Floats:
    values: Floats = tensor.float().cpu().numpy()
    return values
