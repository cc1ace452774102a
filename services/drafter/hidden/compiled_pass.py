"""The draft model's forward pass by compiled code, on the CPU. Loads torch only for more than one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.drafter.hidden.card import HiddenDraftFolder, LayerConfig
from services.drafter.hidden.forward import Floats, Weights
from services.drafter.hidden.target import (
    FolderTensors,
    LogitShape,
    described_target,
    layer_config,
    require_first_layers,
)
from services.drafter.hidden.tensors import HEAD_IDS, draft_tensors, matrix
from shared.errors import ModelError
from shared.kernels.cache import BlockMemory, PackedBatch
from shared.kernels.decoder import Decoder
from shared.kernels.row_product import RowProduct
from shared.kernels.weights import ANOTHER_MODEL, Matrix, Product, ReadWeight, floats, read_product
from shared.models.description import (
    AttentionDescription,
    LayerDescription,
    Linear,
    MlpDescription,
    Norm,
    WeightName,
)
from shared.models.folder import ModelFolder
from shared.models.rope import rope_of

ONES = WeightName("ones")
"""The gain of a norm that has none."""
MAX_ROWS = 128
"""Tokens computed at once. Buffers have this many rows, and a weight is read once for all of them."""


@dataclass(frozen=True)
class _OwnParts:
    """The trained parts of a draft."""

    spread: Floats
    fc: RowProduct
    layers: Decoder


class CompiledDraft:
    """The draft in float32 activations, whatever the format of its weights.

    An estimate's bits depend on the weights and on its session alone, and not on the other sessions of a batch.
    """

    def __init__(self, draft: HiddenDraftFolder, target: ModelFolder, *, form: str, threads: int, blocks: int) -> None:
        """form: format of the weights. Raises ModelError."""
        if threads > 1:
            import torch  # noqa: F401 - the threads are those of its OpenMP runtime
        config = draft.card.model
        self._size, self._eps = config.layer.hidden_size, config.layer.norm_eps
        own = draft_tensors(draft)
        self.head_ids = own[HEAD_IDS]
        self._config, self._threads = config, threads
        options: dict[str, Any] = {
            "hidden_size": self._size,
            "form": form,
            "kv_form": "float32" if form == "float32" else "bfloat16",
            "blocks": blocks,
            "threads": threads,
        }
        self._options = options
        self._own = self._own_parts(own)
        tensors = FolderTensors(target)
        self._bottom = None
        model = described_target(target)
        require_first_layers(target, config.bottom_layers)
        if config.bottom_layers:
            shape = layer_config(target)
            self._bottom = Decoder(
                [target_layer(shape, number) for number in range(config.bottom_layers)],
                _reader(tensors.__getitem__, self._size),
                norm=Norm(ONES, self._eps),
                **options,
            )
        head = _table(tensors, model.head.weight.name, target, self._size)
        self._head = RowProduct(_rows(head, self.head_ids, form), threads)
        self._logits = LogitShape.of(model)
        # Rows are gathered from the mapped file, so the whole embedding is never held in memory.
        self._embedding = _table(tensors, model.embedding.name, target, self._size)

    def _own_parts(self, own: Weights, memory: BlockMemory | None = None) -> _OwnParts:
        """Return the trained parts. memory: the cache to continue; default: a new one. Raises ModelError."""
        read = _reader(own.__getitem__, self._size)
        return _OwnParts(
            floats(own["spread"]),
            RowProduct(read_product(read, [Linear(WeightName("fc.weight"))], self._options["form"]), self._threads),
            Decoder(
                [own_layer(self._config.layer, number) for number in range(self._config.layers)],
                read,
                norm=Norm(WeightName("norm.weight"), self._eps),
                memory=memory,
                **self._options,
            ),
        )

    def replacement(self, weights: Weights) -> Callable[[], None]:
        parts = self._own_parts(weights, self._own.layers.memory)

        def replace() -> None:
            self._own = parts

        return replace

    def forward(self, tokens: list[int], before: Floats, batch: PackedBatch) -> Floats:
        if len(tokens) <= MAX_ROWS:
            return self._last_estimates(tokens, before, batch)
        estimates = np.empty((len(batch.counts), self._size), np.float32)
        first = 0
        for sessions, part in _parts(batch):
            stop = first + sum(part.counts)
            # A session's later part overwrites the estimate of an earlier one.
            estimates[sessions] = self._last_estimates(tokens[first:stop], before[first:stop], part)
            first = stop
        return estimates

    def _last_estimates(self, tokens: list[int], before: Floats, batch: PackedBatch) -> Floats:
        """Compute a batch; return the estimate at each session's last token."""
        size, count, own = self._size, len(tokens), self._own
        embedded = floats(self._embedding[tokens])
        inputs = own.fc.inputs(count)
        inputs[:, :size] = _normed(embedded, self._eps)
        if self._bottom:
            inputs[:, size : 2 * size] = self._bottom.forward(batch, rows=embedded)[0]
        np.divide(before, own.spread, out=inputs[:, -size:])
        states, _ = own.layers.forward(batch, rows=own.fc.multiply(count))
        last: Floats = states[np.cumsum(batch.counts) - 1]
        return last

    def copy_block(self, source: int, target: int) -> None:
        for layers in (self._bottom, self._own.layers):
            if layers is not None:
                layers.memory.copy_block(source, target)

    def logits(self, estimates: Floats) -> Floats:
        count = len(estimates)
        self._head.inputs(count)[:] = estimates
        return self._logits.applied(self._head.multiply(count))


def _parts(batch: PackedBatch) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yield the batch in parts of at most `MAX_ROWS` tokens, in order: indices of a part's sessions, and the part."""
    room = MAX_ROWS
    sessions: list[int] = []
    starts: list[int] = []
    counts: list[int] = []
    for i, (first, total) in enumerate(zip(batch.starts, batch.counts, strict=True)):
        start, end = first, first + total
        while start < end:
            count = min(room, end - start)
            sessions.append(i)
            starts.append(start)
            counts.append(count)
            start, room = start + count, room - count
            if not room:
                yield sessions, PackedBatch([batch.tables[s] for s in sessions], starts, counts)
                sessions, starts, counts, room = [], [], [], MAX_ROWS
    if sessions:
        yield sessions, PackedBatch([batch.tables[s] for s in sessions], starts, counts)


def _normed(x: Floats, eps: float) -> Floats:
    """Return each row divided by its root mean square."""
    # NumPy adds up a contiguous row in an order that the number of rows does not change.
    squares: Floats = np.add.reduce(x * x, axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(eps))
    return normed


def _reader(get: Callable[[str], NDArray[Any]], size: int) -> ReadWeight:
    def read(weight: WeightName) -> Matrix:
        if weight == ONES:
            return np.ones(size, np.float32)
        tensor = get(weight.name)
        if weight.rows is not None:
            tensor = tensor[weight.first_row : weight.first_row + weight.rows]
        return matrix(tensor)

    return read


def _table(tensors: FolderTensors, name: str, target: ModelFolder, size: int) -> NDArray[Any]:
    """Return the embedding or the head. Raises ModelError unless it has a row of the hidden size for each token."""
    tensor, shape = tensors[name], (target.vocab_size, size)
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{target.path}: {name} has shape {tuple(tensor.shape)}, and must have {shape}: {ANOTHER_MODEL}"
        )
    return tensor


def _rows(weight: NDArray[Any], ids: NDArray[np.int64], form: str) -> Product:
    """Return the product with some rows of a matrix."""
    chosen = matrix(weight[ids])
    return read_product(lambda _: chosen, [Linear(WeightName("head"))], form)


def target_layer(config: LayerConfig, number: int) -> LayerDescription:
    """Describe one of a plain Llama's layers, with the names of transformers."""

    def linear(name: str) -> Linear:
        return Linear(WeightName(f"model.layers.{number}.{name}_proj.weight"))

    def norm(name: str) -> Norm:
        return Norm(WeightName(f"model.layers.{number}.{name}.weight"), config.norm_eps)

    return _layer(
        config,
        qkv=(linear("self_attn.q"), linear("self_attn.k"), linear("self_attn.v")),
        out=linear("self_attn.o"),
        mlp=(linear("mlp.gate"), linear("mlp.up"), linear("mlp.down")),
        norms=(norm("input_layernorm"), norm("post_attention_layernorm")),
    )


def own_layer(config: LayerConfig, number: int) -> LayerDescription:
    """Describe one of the draft's own layers, whose file joins q, k and v, and gate and up (`model.Layer`)."""
    inner, kv, wide = config.heads * config.head_size, config.kv_heads * config.head_size, config.intermediate_size

    def part(name: str, first_row: int = 0, rows: int | None = None) -> Linear:
        return Linear(WeightName(f"layers.{number}.{name}.weight", first_row, rows))

    def norm(name: str) -> Norm:
        return Norm(WeightName(f"layers.{number}.{name}.weight"), config.norm_eps)

    return _layer(
        config,
        qkv=(part("qkv", 0, inner), part("qkv", inner, kv), part("qkv", inner + kv, kv)),
        out=part("out"),
        mlp=(part("gate_up", 0, wide), part("gate_up", wide, wide), part("down")),
        norms=(norm("attention_norm"), norm("mlp_norm")),
    )


def _layer(
    config: LayerConfig,
    *,
    qkv: tuple[Linear, Linear, Linear],
    out: Linear,
    mlp: tuple[Linear, Linear, Linear],
    norms: tuple[Norm, Norm],
) -> LayerDescription:
    q, k, v = qkv
    gate, up, down = mlp
    attention_norm, mlp_norm = norms
    parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    return LayerDescription(
        attention=AttentionDescription(
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            q=q,
            k=k,
            v=v,
            out=out,
            scale=config.head_size**-0.5,
            rope=rope_of(parameters, rotary_size=config.head_size, max_len=0),
        ),
        mlp=MlpDescription(gate=gate, up=up, down=down, activation="silu"),
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
    )
