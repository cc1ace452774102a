"""The part of a described model that one of several GPUs computes: some heads, some columns, some of the vocabulary.

Tensor parallelism after Megatron-LM (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053): q, k, v, gate and up are
split by outputs, so each GPU has heads and columns of its own; out and down are split by inputs, so each GPU has a part
of every sum. The head is split by outputs. Norms and the embedding are whole on each GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.gpu_kernels.plan import ROW_TILE
from shared.kernels.formats import Blocks, padded
from shared.models.description import (
    AttentionDescription,
    LayerDescription,
    Linear,
    MlpDescription,
    ModelDescription,
    WeightName,
)

Read = Callable[[WeightName], NDArray[Any] | Blocks]
OutputsOf = Callable[[Linear], int]
"""Returns the number of outputs of a product."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A part as a description of its own, with fewer heads, and the columns of weights of which it has some only."""

    model: ModelDescription
    columns: Mapping[WeightName, range]

    def reader(self, read: Read) -> Read:
        """Return a reader of this part's weights."""

        def read_part(weight: WeightName) -> NDArray[Any] | Blocks:
            matrix = read(weight)
            if (columns := self.columns.get(weight)) is None or isinstance(matrix, Blocks):
                return matrix
            return np.ascontiguousarray(matrix[:, columns.start : columns.stop])

        return read_part


def head_columns(vocab_size: int, ranks: int) -> int:
    """Return the number of outputs of the head that each GPU has: whole tiles, the last GPU's filled up."""
    return padded(-(-vocab_size // ranks), ROW_TILE)


def part_of(model: ModelDescription, outputs_of: OutputsOf, rank: int, ranks: int) -> ModelPart:
    """Return the part of one GPU. Raises EngineError where the model cannot be split among that many."""
    if ranks == 1:
        return ModelPart(model, {})
    columns: dict[WeightName, range] = {}
    layers = tuple(_layer(layer, outputs_of, rank, ranks, columns) for layer in model.layers)
    first = rank * head_columns(model.vocab_size, ranks)
    last = min(first + head_columns(model.vocab_size, ranks), model.vocab_size)
    if first >= last:
        raise EngineError(f"a vocabulary of {model.vocab_size} tokens cannot be split among {ranks} GPUs")
    return ModelPart(replace(model, layers=layers, head=_rows(model.head, first, last - first)), columns)


def _layer(
    layer: LayerDescription, outputs_of: OutputsOf, rank: int, ranks: int, columns: dict[WeightName, range]
) -> LayerDescription:
    attention: AttentionDescription = layer.attention
    mlp: MlpDescription = layer.mlp
    if attention.norms_whole_row and (attention.q_norm or attention.k_norm):
        raise EngineError("a model whose norms of q and k span all heads (OLMo 2) cannot be split among GPUs")
    heads, kv_heads = (_share(count, "heads", ranks) for count in (attention.heads, attention.kv_heads))
    inner = _share(outputs_of(mlp.gate), "columns of its MLP", ranks)
    q, kv = heads * attention.head_size, kv_heads * attention.head_size
    return replace(
        layer,
        attention=replace(
            attention,
            heads=heads,
            kv_heads=kv_heads,
            q=_rows(attention.q, rank * q, q),
            k=_rows(attention.k, rank * kv, kv),
            v=_rows(attention.v, rank * kv, kv),
            out=_columns(attention.out, rank, q, columns),
        ),
        mlp=replace(
            mlp,
            gate=_rows(mlp.gate, rank * inner, inner),
            up=_rows(mlp.up, rank * inner, inner),
            down=_columns(mlp.down, rank, inner, columns),
        ),
    )


def _share(count: int, what: str, ranks: int) -> int:
    if count % ranks:
        raise EngineError(
            f"a model with {count} {what} in a layer cannot be split among {ranks} GPUs: their number must divide it"
        )
    return count // ranks


def _rows(linear: Linear, first: int, rows: int) -> Linear:
    def cut(weight: WeightName) -> WeightName:
        return WeightName(weight.name, weight.first_row + first, rows)

    return Linear(cut(linear.weight), cut(linear.bias) if linear.bias else None)


def _columns(linear: Linear, rank: int, count: int, columns: dict[WeightName, range]) -> Linear:
    """Return a product of some of the inputs. The first GPU's part has the bias, so that it is added once."""
    columns[linear.weight] = range(rank * count, (rank + 1) * count)
    return replace(linear, bias=linear.bias if rank == 0 else None)
