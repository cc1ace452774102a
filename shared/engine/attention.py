"""The attention function that transformers calls, and its KV caches.

`BlockCache` is for the CPU and attends over the blocks in place (`shared.kernels`). `GatherCache` is for every other
torch device: it copies a session's keys and values for each step and calls torch's attention, so bits may depend on the
batch. `LayeredCache` has one of them for each shape of keys and values that a model's layers have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from shared.engine.masks import MASKS, NAME, MaskRule, UnknownMask
from shared.engine.positions import QUERY_TUNING, QueryTuning
from shared.engine.views import block_views
from shared.errors import ModelError
from shared.kernels import native, team
from shared.kernels.cache import BlockMemory, KvShape, PackedBatch, ScoreOptions
from shared.kernels.layout import BLOCK, FUNCTIONS, PASS_WORDS, AttentionWord, JobWord, PassWord

IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "cu_seqlens", "deterministic", "dropout", "is_causal",
    "logits_to_keep", "max_length_k", "max_length_q", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "use_cache",
})  # fmt: skip
"""Keywords of attention functions that change nothing here: positions are in q and k already, and a batch's bounds come
from its `PackedBatch`."""


class Cache(Protocol):
    """Keys and values of all blocks and layers. q, k and v are (tokens, heads, head size) with the batch's tokens first
    and padding after them; what `attend` returns has a row per row of q, padding rows finite."""

    def views(self, block: int) -> Sequence[torch.Tensor]:
        """Return views of a block's keys and values in all layers, for reading or writing whole blocks."""

    def begin(self, batch: PackedBatch) -> None:
        """Start a batch: the following `attend` calls, one per layer, are for it."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: ScoreOptions,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new keys and values, then attend causally within each session.

        sinks: the score of one more key per query head, whose value is zero.
        """


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
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: ScoreOptions,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = [tensor.float().contiguous() for tensor in (q, k, v)]
        out = torch.zeros_like(rows[0])
        scores_of_sinks = None if sinks is None else sinks.float().contiguous()
        self._memory.set_scores(layer, scores)
        self._memory.set_sinks(layer, 0 if scores_of_sinks is None else scores_of_sinks.data_ptr())
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

    def __init__(self, shape: KvShape, blocks: int, dtype: torch.dtype, torch_device: torch.device) -> None:
        self._group = shape.heads // shape.kv_heads
        rows = (shape.layers, blocks * BLOCK, shape.kv_heads, shape.head_size)
        self._keys = torch.zeros(rows, dtype=dtype, device=torch_device)
        self._values = torch.zeros(rows, dtype=dtype, device=torch_device)
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
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: ScoreOptions,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = sum(self._counts)
        new = torch.cat([slots[-count:] for slots, count in zip(self._slots, self._counts, strict=True)])
        self._keys[layer].index_copy_(0, new, k[:total])
        self._values[layer].index_copy_(0, new, v[:total])
        out = torch.zeros_like(q)
        row = 0
        for slots, count in zip(self._slots, self._counts, strict=True):
            key_position = torch.arange(len(slots), device=q.device)[None, :]
            position = key_position[0, -count:, None]
            seen = key_position <= position
            if scores.window:
                seen &= key_position > position - scores.window
            if scores.chunk:
                seen &= key_position // scores.chunk == position // scores.chunk
            query = q[row : row + count].transpose(0, 1)[None]
            key, value = (
                rows[layer][slots].transpose(0, 1).repeat_interleave(self._group, 0)[None]
                for rows in (self._keys, self._values)
            )
            if scores.softcap or sinks is not None:
                mixed = _attend_in_parts(query, key, value, seen, scores, sinks)
            else:
                mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scores.scale)
            out[row : row + count] = mixed[0].transpose(0, 1)
            row += count
        return out


def _attend_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scores: ScoreOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with a soft cap and sinks, which torch's attention does not have."""
    result = (query @ key.transpose(-1, -2)).float() * scores.scale
    if scores.softcap:
        result = scores.softcap * torch.tanh(result / scores.softcap)
    result = result.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        result = torch.cat([result, sinks.float().view(1, -1, 1, 1).expand(*result.shape[:-1], 1)], -1)
    return result.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of a layer's attention, as seen in a model's first pass."""

    kv_heads: int
    heads: int
    key_size: int
    value_size: int

    @property
    def head_size(self) -> int:
        """Size of a head in the cache. The smaller of key and value is filled up with zeros, which change no bit."""
        return max(self.key_size, self.value_size)


class LayeredCache:
    """A cache for layers of any shapes and masks: one of `make` for all layers with equal sizes."""

    def __init__(
        self, layers: Mapping[int, LayerShape], masks: Mapping[int, MaskRule], make: Callable[[KvShape], Cache]
    ) -> None:
        """layers: shape of each layer that attends, by number. masks: rules of those whose mask is known."""
        self._layers, self._masks = layers, masks
        groups: dict[tuple[int, int, int], list[int]] = {}
        for layer, shape in sorted(layers.items()):
            groups.setdefault((shape.kv_heads, shape.heads, shape.head_size), []).append(layer)
        self._caches = [make(KvShape(len(members), *sizes)) for sizes, members in groups.items()]
        self._place = {
            layer: (cache, index)
            for cache, members in zip(self._caches, groups.values(), strict=True)
            for index, layer in enumerate(members)
        }

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return [view for cache in self._caches for view in cache.views(block)]

    def begin(self, batch: PackedBatch) -> None:
        for cache in self._caches:
            cache.begin(batch)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: ScoreOptions,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (rule := self._masks.get(layer)) is not None:
            scores = ScoreOptions(scores.scale, rule.window, scores.softcap, rule.chunk)
        cache, index = self._place[layer]
        size = self._layers[layer].head_size
        q, k, v = (pad(each, (0, size - each.shape[2])) if each.shape[2] < size else each for each in (q, k, v))
        return cache.attend(index, q, k, v, scores, sinks)[..., : self._layers[layer].value_size]


class Recorder:
    """A stand-in for the cache in a model's first pass that records shapes and masks of its layers.

    Its sessions have one token each, so a row attends to itself."""

    def __init__(self, limit: int) -> None:
        """limit: most tokens of a session."""
        self.layers: dict[int, LayerShape] = {}
        self.masks: dict[int, MaskRule] = {}
        self._limit = limit
        self._rules: dict[int, tuple[torch.Tensor, MaskRule]] = {}  # by id of the mask, which is kept with it

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: ScoreOptions,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer in self.layers:
            raise ModelError(f"layer {layer} attends twice, which has no place in the KV cache")
        if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or len(q) != len(k):
            raise ModelError(
                f"layer {layer} has queries of shape {tuple(q.shape)}, keys {tuple(k.shape)} and values "
                f"{tuple(v.shape)} (tokens, heads, size), which do not fit together"
            )
        self.layers[layer] = LayerShape(k.shape[1], q.shape[1], k.shape[2], v.shape[2])
        return v.repeat_interleave(q.shape[1] // k.shape[1], 1)

    def see_mask(self, layer: int, mask: torch.Tensor) -> None:
        """Record the mask that transformers gave to a layer. Raises ModelError for one that has no rule."""
        try:
            if id(mask) not in self._rules:
                self._rules[id(mask)] = mask, MaskRule.of(mask, self._limit)
            _, self.masks[layer] = self._rules[id(mask)]
        except UnknownMask as error:
            raise ModelError(f"layer {layer} has a mask of its own ({error})") from error


_current: ContextVar[tuple[LayeredCache | Recorder, torch.Tensor] | None] = ContextVar("current", default=None)


@contextmanager
def attending(cache: LayeredCache | Recorder, positions: torch.Tensor) -> Iterator[None]:
    """Let the attention of a model's pass use this cache, for rows at these positions. A context instead of keywords,
    which not every model passes on to its layers."""
    token = _current.set((cache, positions))
    masks = MASKS.set(isinstance(cache, Recorder))
    try:
        yield
    finally:
        MASKS.reset(masks)
        _current.reset(token)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in one layer of a transformers model.

    Takes query (1, heads, tokens, size), key and value (1, kv heads, tokens, size); returns (1, tokens, heads, size).
    Causality and the bounds of sessions come from the cache's batch: outside of the first pass there is no mask.
    """
    current, layer = _current.get(), getattr(module, "layer_idx", None)
    if current is None or layer is None:
        raise ModelError(f"{type(module).__name__} attends outside of the decoder's layers")
    cache, positions = current
    unknown = [name for name, value in kwargs.items() if name not in IGNORED and value is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} needs {', '.join(unknown) or 'attention to later tokens'}")
    if attention_mask is not None:
        if not isinstance(cache, Recorder):
            raise ModelError(f"{type(module).__name__} needs a mask of its own")
        cache.see_mask(layer, attention_mask)
    tuning: QueryTuning | None = getattr(module, QUERY_TUNING, None)
    if tuning is not None:
        query = (query * tuning.factors(positions)[:, None]).to(query.dtype)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = cache.attend(
        layer,
        q,
        k,
        v,
        ScoreOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0),
        s_aux,
    )
    return out[None], None


AttentionInterface.register(NAME, attention)
