"""Memory that a described model takes on a GPU, from its shapes alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shared.errors import EngineError
from shared.gpu_kernels.parts import OutputsOf
from shared.gpu_kernels.plan import ROW_SECTIONS, ROW_TILE, RUN_FLOATS, width
from shared.kernels.formats import padded
from shared.kernels.layout import BLOCK
from shared.models.description import LayerDescription, Linear, ModelDescription, Norm

ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
ROWS: Final = 4096
"""Rows that buffers are reckoned for: twice the tokens of a scheduler's largest batch, as buffers double."""
LOGIT_ROWS: Final = 1024
"""Rows of logits at once: of the graphs, of a batch, and its copy."""
RESERVED_BYTES: Final = 1 << 30
"""For the kernels' code, graphs, and what the allocator cannot use. By judgement: nobody has measured it on a GPU."""
LEAST_TOKENS: Final = 1024
"""Fewest tokens of KV that a model is loaded with, where the number is not given."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device: free ones, and all."""

    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.free / 2**30:.1f} of {self.total / 2**30:.1f} GiB free"


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a model takes on a device."""

    weights: int
    buffers: int
    block: int
    """Keys and values of a block, and what is kept beside them."""


def need_of(model: ModelDescription, outputs_of: OutputsOf, form: str, beside: int = 0) -> MemoryNeed:
    """Return the need of a model, or of a part of one. form: of the weights. beside: bytes kept beside a token's KV."""
    item, hidden = ITEM_BYTES[form], model.hidden_size
    weights = item * padded(model.vocab_size, ROW_TILE) * padded(hidden, ROW_TILE) + _norm(model.norm, hidden)
    head = padded(outputs_of(model.head), ROW_TILE)
    if not model.is_tied:
        weights += _product([model.head], outputs_of, hidden, item)
    weights += sum(_layer(layer, outputs_of, hidden, item) for layer in model.layers)
    attention = model.layers[0].attention
    kv = 2 * len(model.layers) * attention.kv_heads * attention.head_size * item
    return MemoryNeed(weights, _buffers(model, outputs_of, item, head), BLOCK * (kv + beside))


def blocks_that_fit(need: MemoryNeed, memory: DeviceMemory, share: float, asked: int | None, what: str) -> int:
    """Return the blocks of KV for a device.

    share: of the device's memory that may be taken, at most what is free. asked: number of blocks; None for all that
    fit. what: names model and device in the error. Raises EngineError if they do not fit.
    """
    usable = min(memory.free, int(share * memory.total))
    left = usable - need.weights - need.buffers
    blocks = max(left, 0) // need.block
    wanted = asked if asked is not None else LEAST_TOKENS // BLOCK
    if blocks < wanted:
        raise EngineError(
            f"{what} do not fit: weights of {_gib(need.weights)}, buffers of {_gib(need.buffers)} and KV of "
            f"{wanted * BLOCK} tokens in {_gib(wanted * need.block)} are more than {_gib(usable)}, which "
            f"WISP_GPU_MEMORY={share:g} allows with {memory}. Free the GPU, raise WISP_GPU_MEMORY, lower "
            "WISP_CACHE_TOKENS, choose a smaller model, or split it among more GPUs (WISP_GPUS)"
        )
    return asked if asked is not None else blocks


def _product(parts: list[Linear], outputs_of: OutputsOf, inputs: int, item: int, *, biased: bool = False) -> int:
    outputs = padded(sum(outputs_of(part) for part in parts), ROW_TILE)
    bias = 4 * outputs if biased or any(part.bias for part in parts) else 0
    return item * outputs * padded(inputs, ROW_TILE) + bias


def _norm(norm: Norm | None, size: int) -> int:
    return 4 * size if norm else 0


def _layer(layer: LayerDescription, outputs_of: OutputsOf, hidden: int, item: int) -> int:
    attention, mlp = layer.attention, layer.mlp
    biased = mlp.gate.bias is not None or mlp.up.bias is not None
    inner = outputs_of(mlp.gate)
    products = (
        _product([attention.q, attention.k, attention.v], outputs_of, hidden, item),
        _product([attention.out], outputs_of, attention.heads * attention.head_size, item),
        *(_product([one], outputs_of, hidden, item, biased=biased) for one in (mlp.gate, mlp.up)),
        _product([mlp.down], outputs_of, inner, item),
    )
    rows = (layer.attention_norm, layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm)
    whole = attention.norms_whole_row
    heads = (
        _norm(attention.q_norm, attention.head_size * (attention.heads if whole else 1)),
        _norm(attention.k_norm, attention.head_size * (attention.kv_heads if whole else 1)),
    )
    return sum((*products, *(_norm(norm, hidden) for norm in rows), *heads))


def _buffers(model: ModelDescription, outputs_of: OutputsOf, item: int, head: int) -> int:
    layer, hidden = model.layers[0], model.hidden_size
    attention = layer.attention
    q = attention.heads * attention.head_size
    qkv = q + 2 * attention.kv_heads * attention.head_size
    inner = max(outputs_of(one.mlp.gate) for one in model.layers)
    floats = 3 * padded(hidden, ROW_TILE) + padded(qkv, ROW_TILE) + ROW_SECTIONS
    operands = padded(hidden, ROW_TILE) + 2 * padded(q, ROW_TILE) + padded(inner, ROW_TILE)
    runs = 4 * RUN_FLOATS + 8 * RUN_FLOATS // attention.head_size
    return (
        ROWS * (4 * floats + item * operands) + 4 * LOGIT_ROWS * head + runs + sum(_rotations(model)) + RESERVED_BYTES
    )


def _rotations(model: ModelDescription) -> Iterator[int]:
    for rope in {layer.attention.rope for layer in model.layers}:
        if rope:
            yield 8 * width(model.max_len, 1024) * len(rope.inverse_frequencies)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
