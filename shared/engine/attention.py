"""The attention function that transformers calls, and its two KV caches.

`BlockCache` is for the CPU and attends over the blocks in place (`shared.kernels`). `GatherCache` is for every other
torch device: it copies a session's keys and values for each step and calls torch's attention, so bits may depend on the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from shared.engine.views import block_views
from shared.errors import ModelError
from shared.kernels import native, team
from shared.kernels.cache import BlockMemory, KvShape, PackedBatch, ScoreOptions
from shared.kernels.layout import BLOCK, FUNCTIONS, PASS_WORDS, AttentionWord, JobWord, PassWord

NAME = "wisp"
"""Name under which transformers finds the attention function."""


class Cache(Protocol):
    """Keys and values of all blocks and layers. q, k and v are (tokens, heads, head size) with the batch's tokens first
    and padding after them; what `attend` returns has q's shape, padding rows finite."""

    def views(self, block: int) -> Sequence[torch.Tensor]:
        """Return views of a block's keys and values in all layers, for reading or writing whole blocks."""

    def begin(self, batch: PackedBatch) -> None:
        """Start a batch: the following `attend` calls, one per layer, are for it."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        """Store the new keys and values, then attend causally within each session; window 0 is no window."""


class BlockCache:
    """Blocks on the CPU, attended in place by the compiled kernel."""

    def __init__(self, shape: KvShape, blocks: int, dtype: torch.dtype, threads: int) -> None:
        form = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
        self._memory = BlockMemory(shape, [ScoreOptions(1.0)] * shape.layers, blocks, form)
        self._threads = threads
        self._function = native.load()
        self._scratch = np.zeros((threads, self._memory.scratch_floats), np.float32)
        self._job, self._counters = team.job_words(PASS_WORDS, phases=2)
        self._job[JobWord.FUNCTION] = FUNCTIONS.index(f"attend_{form}")
        self._job[PassWord.SCRATCH], self._job[PassWord.SCRATCH_BYTES] = (
            self._scratch.ctypes.data,
            self._scratch.strides[0],
        )

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return block_views(self._memory, block)

    def begin(self, batch: PackedBatch) -> None:
        self._memory.begin(batch)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        rows = [tensor.float().contiguous() for tensor in (q, k, v)]
        out = torch.zeros_like(rows[0])
        self._memory.set_scores(layer, ScoreOptions(scale, window))
        job = self._memory.jobs[layer]
        for tensor, word, stride in (
            (rows[0], AttentionWord.QUERY, AttentionWord.QUERY_STRIDE),
            (rows[1], AttentionWord.KEY, AttentionWord.KEY_STRIDE),
            (rows[2], AttentionWord.VALUE, AttentionWord.VALUE_STRIDE),
            (out, AttentionWord.OUT, AttentionWord.OUT_STRIDE),
        ):
            job[word], job[stride] = tensor.data_ptr(), tensor[0].numel()
        self._job[PassWord.ATTENDED], self._job[PassWord.SPANS] = job.ctypes.data, self._memory.spans
        team.run(self._function, self._job, self._counters, self._threads)
        return out.to(q.dtype)


class GatherCache:
    """Blocks on any torch device; each step gathers the keys and values it reads."""

    def __init__(self, shape: KvShape, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self._group = shape.heads // shape.kv_heads
        rows = (shape.layers, blocks * BLOCK, shape.kv_heads, shape.head_size)
        self._keys = torch.zeros(rows, dtype=dtype, device=device)
        self._values = torch.zeros(rows, dtype=dtype, device=device)
        self._slots: list[torch.Tensor] = []
        self._counts: list[int] = []

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return [rows[:, block * BLOCK : (block + 1) * BLOCK] for rows in (self._keys, self._values)]

    def begin(self, batch: PackedBatch) -> None:
        device = self._keys.device
        self._counts = list(batch.counts)
        self._slots = []
        for table, start, count in zip(batch.tables, batch.starts, batch.counts, strict=True):
            slots = torch.tensor(table, device=device)[:, None] * BLOCK + torch.arange(BLOCK, device=device)
            self._slots.append(slots.flatten()[: start + count])

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        total = sum(self._counts)
        new = torch.cat([slots[-count:] for slots, count in zip(self._slots, self._counts, strict=True)])
        self._keys[layer].index_copy_(0, new, k[:total])
        self._values[layer].index_copy_(0, new, v[:total])
        out = torch.zeros_like(q)
        row = 0
        for slots, count in zip(self._slots, self._counts, strict=True):
            position = torch.arange(len(slots), device=q.device)
            ahead = position[None, :] - position[-count:, None]
            seen = (ahead <= 0) & (ahead > -window) if window else ahead <= 0
            query = q[row : row + count].transpose(0, 1)[None]
            key, value = (
                rows[layer][slots].transpose(0, 1).repeat_interleave(self._group, 0)[None]
                for rows in (self._keys, self._values)
            )
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
            out[row : row + count] = mixed[0].transpose(0, 1)
            row += count
        return out


class Probe:
    """A stand-in for the cache in a model's first pass that records the shape of its keys and values."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int, int]] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
            raise ModelError(
                f"layer {layer} has queries of shape {tuple(q.shape[1:])}, keys {tuple(k.shape[1:])} and values "
                f"{tuple(v.shape[1:])} (heads, size); only equal head sizes are supported: choose another model"
            )
        self._seen[layer] = k.shape[1], q.shape[1], q.shape[2]
        return torch.zeros_like(q)

    def shape(self) -> KvShape:
        """Return the recorded shape. Raises ModelError if layers differ or some did not call our attention."""
        if len(set(self._seen.values())) != 1 or sorted(self._seen) != list(range(len(self._seen))):
            raise ModelError(
                "the model's layers do not all use one kind of attention through transformers' AttentionInterface "
                f"(saw {self._seen}); choose a model with plain attention in every layer"
            )
        return KvShape(len(self._seen), *next(iter(self._seen.values())))


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in one layer of a transformers model.

    Takes query (1, heads, tokens, size), key and value (1, kv heads, tokens, size); returns (1, tokens, heads, size).
    `cache` comes from `ModulePass.run`. Causality and the bounds of sessions come from the cache's batch: there is no
    mask.
    """
    if cache is None:
        raise ModelError(f"{type(module).__name__} does not pass keyword arguments on to its attention: unsupported")
    unsupported = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if unsupported or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} needs {', '.join(unsupported) or 'a mask of its own'}: unsupported")
    out = cache.attend(
        module.layer_idx,
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
    )
    return out[None], None


# Without a mask function: transformers then makes no mask at all.
AttentionInterface.register(NAME, attention)
