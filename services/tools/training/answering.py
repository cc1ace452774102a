"""The target as it answers prompts for training: many texts at once, each with the states that a draft learns from.

`EngineTarget` is the serving engine. `BatchTarget` serves CPUs with bfloat16 instructions: torch's products use them,
and are several times faster than the engine's on a few hundred rows. Its bits depend on the batch, which does not
matter for texts to learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from services.drafter.hidden.model import run_layers
from services.drafter.hidden.target import described_target, layer_config, not_plain
from services.drafter.hidden.target_parts import target_parts
from services.drafter.learning.head_loss import shaped
from services.drafter.learning.update import computes_bfloat16
from shared.engine import Engine, Step
from shared.engine.attention import BlockCache
from shared.kernels.cache import KvShape, PackedBatch, ScoreOptions
from shared.kernels.layout import BLOCK
from shared.models.folder import ModelFolder


class AnsweringTarget(Protocol):
    """The target with a KV cache for texts by name."""

    texts: int
    """Most texts at once."""
    longest: int
    """Most tokens of a text."""

    def start(self, name: str) -> None:
        """Make room for a new text."""

    def forward(self, steps: Sequence[Step]) -> Tensor:
        """Compute new tokens of texts; return logits of the last one of each step with rows: (rows, vocabulary)."""

    def states(self, name: str, count: int) -> Tensor:
        """Return the states after the last norm at a text's first tokens, (count, size)."""

    def release(self, name: str) -> None:
        """Forget a text."""


class EngineTarget:
    """The serving engine, which has to keep hidden states."""

    def __init__(self, engine: Engine, texts: int) -> None:
        """texts: most texts at once."""
        self._engine, self.texts = engine, texts
        self.longest = min(engine.max_len, engine.budget_tokens // texts // BLOCK * BLOCK)

    def start(self, name: str) -> None:
        self._engine.attach(name, [0])  # nothing is shared, so that each token gets its state

    def forward(self, steps: Sequence[Step]) -> Tensor:
        return self._engine.forward(steps).logits

    def states(self, name: str, count: int) -> Tensor:
        return self._engine.hidden(name, 0, count).cpu()

    def release(self, name: str) -> None:
        self._engine.release(name)


def batch_target_fits(target: ModelFolder, device: str, dtype: str) -> bool:
    """Return whether `BatchTarget` computes this target, and faster than the engine does."""
    return (device, dtype) == ("cpu", "bfloat16") and not not_plain(target) and computes_bfloat16(torch.device("cpu"))


class BatchTarget:
    """A plain Llama model, by torch's products and the kernels' attention."""

    def __init__(
        self, target: ModelFolder, *, texts: int, longest: int, threads: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """texts: most texts at once. longest: tokens of the longest."""
        torch.set_num_threads(threads)
        self.texts = texts
        layer, layers = layer_config(target), len(described_target(target).layers)
        self._parts = target_parts(target, layers, dtype)
        self._scores = ScoreOptions(layer.head_size**-0.5)
        blocks = -(-longest // BLOCK)
        shape = KvShape(layers, layer.kv_heads, layer.heads, layer.head_size)
        self._cache = BlockCache(shape, texts * blocks, dtype, threads)
        self._free = [list(range(i * blocks, (i + 1) * blocks)) for i in range(texts)]
        self._eps = layer.norm_eps
        self._tables: dict[str, list[int]] = {}
        self._states: dict[str, Tensor] = {}
        self._held: dict[str, int] = {}
        self._size = layer.hidden_size
        self.longest = min(longest, target.max_len)

    def start(self, name: str) -> None:
        self._tables[name] = self._free.pop()
        self._states[name] = torch.empty(self.longest, self._size, dtype=self._parts.head.dtype)
        self._held[name] = 0

    @torch.inference_mode()
    def forward(self, steps: Sequence[Step]) -> Tensor:
        starts, counts = [self._held[step.session_id] for step in steps], [len(step.tokens) for step in steps]
        self._cache.begin(PackedBatch([self._tables[step.session_id] for step in steps], starts, counts))
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        embedded = self._parts.embedding[torch.tensor([token for step in steps for token in step.tokens])]
        x = run_layers(list(self._parts.bottom), embedded, positions, self._attend)  # type: ignore[arg-type]
        states = functional.rms_norm(x.float(), (self._size,), self._parts.norm.float(), self._eps).to(x.dtype)
        for step, start, new in zip(steps, starts, torch.split(states, counts), strict=True):
            self._states[step.session_id][start : start + len(new)] = new
            self._held[step.session_id] = start + len(new)
        last = torch.tensor(counts).cumsum(0) - 1
        asked = last[torch.tensor([step.rows > 0 for step in steps])]
        return shaped(functional.linear(states[asked], self._parts.head).float(), self._parts.logits)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._cache.attend(layer, q, k, v, self._scores)

    def states(self, name: str, count: int) -> Tensor:
        return self._states[name][:count].clone()

    def release(self, name: str) -> None:
        self._free.append(self._tables.pop(name))
        del self._states[name], self._held[name]
