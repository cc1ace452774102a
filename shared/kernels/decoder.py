"""A decoder whose whole forward pass is one call of compiled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.kernels import native, team
from shared.kernels.cache import BlockMemory, KvShape, PackedBatch, ScoreOptions, float_bits, positions_of
from shared.kernels.formats import PANEL, SCALE_BLOCK, padded
from shared.kernels.layout import (
    ACTIVATIONS,
    FUNCTIONS,
    LAYER_WORDS,
    PASS_WORDS,
    PHASES,
    PHASES_PER_LAYER,
    AttentionWord,
    JobWord,
    LayerWord,
    PassWord,
    ProductWord,
)
from shared.kernels.weights import (
    ANOTHER_MODEL,
    Floats,
    Product,
    ReadWeight,
    floats,
    read_gated_product,
    read_product,
    read_weight,
    require_size,
)
from shared.models.description import LayerDescription, Linear, ModelDescription, Norm, Rope
from shared.models.rope import rotation_table


class Decoder:
    """Layers with an optional embedding before, and an optional norm and head after them.

    The bits of a row's states and logits depend on the weights and on the row's session alone. Not thread-safe.
    """

    def __init__(
        self,
        layers: Sequence[LayerDescription],
        read: ReadWeight,
        *,
        hidden_size: int,
        form: str,
        kv_form: str,
        blocks: int,
        threads: int,
        norm: Norm | None = None,
        embedding: Product | None = None,
        embedding_multiplier: float = 1.0,
        head: Product | None = None,
        logit_multiplier: float = 1.0,
        logit_softcap: float = 0.0,
        memory: BlockMemory | None = None,
    ) -> None:
        """form: the format of weights that are not in blocks already (`formats.FORMATS`). kv_form: of keys and values,
        "float32" or "bfloat16". blocks: capacity of the cache. threads: at most this many. memory: the cache of a
        decoder of the same shape, which the other must not use once this one computes; default: a new one."""
        self.hidden_size, self.threads = hidden_size, threads
        self._function = native.load()
        self._kept: list[object] = []
        first = layers[0].attention
        shape = KvShape(len(layers), first.kv_heads, first.heads, first.head_size)
        scores = [
            ScoreOptions(layer.attention.scale, layer.attention.window, layer.attention.softcap) for layer in layers
        ]
        self.memory = memory or BlockMemory(shape, scores, blocks, kv_form)
        self._layers = np.zeros((len(layers), LAYER_WORDS), np.int64)
        self._ropes = _RotationTables([layer.attention.rope for layer in layers])
        widths = [padded(hidden_size, 2 * PANEL)]
        for number, layer in enumerate(layers):
            widths += self._fill_layer(number, layer, read, form)
        phases = PHASES + PHASES_PER_LAYER * len(layers)
        self._job, self._counters = team.job_words(PASS_WORDS, phases)
        self._job[JobWord.FUNCTION] = FUNCTIONS.index(f"decode_{kv_form}")
        self._scratch = np.zeros((threads, self.memory.scratch_floats), np.float32)
        self._strides = _strides(shape, hidden_size, max(widths))
        self._buffers: dict[PassWord, Floats] = {}
        self._set_sizes(
            {
                PassWord.EMBEDDING_MULTIPLIER: float_bits(embedding_multiplier),
                PassWord.LOGIT_MULTIPLIER: float_bits(logit_multiplier),
                PassWord.LOGIT_SOFTCAP: float_bits(logit_softcap),
            }
        )
        self._set_norm(self._job, PassWord.NORM, norm, hidden_size, read)
        self._head = head
        if embedding:
            self._set_product(self._job, PassWord.EMBEDDING, embedding)
        if head:
            self._set_product(self._job, PassWord.HEAD, head)

    def _set_sizes(self, factors: Mapping[PassWord, int]) -> None:
        """Write the words that every batch has: sizes, strides, and addresses of the layers and the scratch memory."""
        self._set(
            {
                PassWord.HIDDEN_SIZE: self.hidden_size,
                PassWord.HIDDEN_STRIDE: self._strides[PassWord.X],
                PassWord.QKV_STRIDE: self._strides[PassWord.QKV],
                PassWord.ATTENDED_STRIDE: self._strides[PassWord.ATTENDED],
                PassWord.PRODUCT_STRIDE: self._strides[PassWord.PRODUCT],
                PassWord.GATED_STRIDE: self._strides[PassWord.GATED],
                PassWord.LAYERS: self._layers.ctypes.data,
                PassWord.LAYER_COUNT: len(self._layers),
                PassWord.SCRATCH: self._scratch.ctypes.data,
                PassWord.SCRATCH_BYTES: self._scratch.strides[0],
                **factors,
            }
        )

    @classmethod
    def of(cls, model: ModelDescription, read: ReadWeight, **options: Any) -> Decoder:
        """Return the decoder of a whole model; options as in the constructor."""
        embedding = read_product(read, [Linear(model.embedding)], options["form"])
        tied = model.head.weight == model.embedding and model.head.bias is None
        return cls(
            model.layers,
            read,
            hidden_size=model.hidden_size,
            norm=model.norm,
            embedding=embedding,
            embedding_multiplier=model.embedding_multiplier,
            head=embedding if tied else read_product(read, [model.head], options["form"]),
            logit_multiplier=model.logit_multiplier,
            logit_softcap=model.logit_softcap,
            **options,
        )

    def forward(
        self,
        batch: PackedBatch,
        *,
        tokens: Sequence[int] | None = None,
        rows: Floats | None = None,
        wanted: Sequence[int] = (),
    ) -> tuple[Floats, Floats]:
        """Compute a packed batch: its tokens, or rows (tokens, hidden size) that take the place of their embeddings.

        Returns the last norm's output (tokens, hidden size), a view that the next call overwrites, and logits of the
        wanted rows, new (wanted, outputs of the head).
        """
        positions = positions_of(batch)
        count = len(positions)
        self._grow(count)
        self._ropes.cover(int(positions.max()) + 1, self._layers)
        ids = np.asarray(tokens if tokens is not None else (), np.int64)
        if rows is not None:
            self._buffers[PassWord.X][:count, : self.hidden_size] = rows
        self.memory.begin(batch)
        chosen = np.asarray(wanted, np.int64)
        columns = self._head.packed.padded_outputs if self._head else 0
        logits = np.empty((len(chosen), columns), np.float32)
        self._set(
            {
                PassWord.TOKENS: ids.ctypes.data if tokens is not None else 0,
                PassWord.ROWS: count,
                PassWord.POSITIONS: positions.ctypes.data,
                PassWord.SPANS: self.memory.spans,
                PassWord.WANTED: chosen.ctypes.data,
                PassWord.WANTED_COUNT: len(chosen),
                PassWord.LOGITS: logits.ctypes.data,
                PassWord.LOGITS_STRIDE: columns,
            }
        )
        team.run(self._function, self._job, self._counters, self.threads)
        states = self._buffers[PassWord.NORMED][:count, : self.hidden_size]
        return states, logits[:, : self._head.packed.outputs] if self._head else logits

    def _fill_layer(self, number: int, layer: LayerDescription, read: ReadWeight, form: str) -> list[int]:
        """Write a layer's words; return the widths of its products' outputs."""
        words, attention, mlp = self._layers[number], layer.attention, layer.mlp
        words[LayerWord.ATTENTION] = self.memory.jobs[number].ctypes.data
        hidden = self.hidden_size
        q, kv = attention.heads * attention.head_size, attention.kv_heads * attention.head_size
        whole = attention.norms_whole_row
        for word, norm, size in (
            (LayerWord.ATTENTION_NORM, layer.attention_norm, hidden),
            (LayerWord.ATTENTION_POST_NORM, layer.attention_post_norm, hidden),
            (LayerWord.MLP_NORM, layer.mlp_norm, hidden),
            (LayerWord.MLP_POST_NORM, layer.mlp_post_norm, hidden),
            (LayerWord.Q_NORM, attention.q_norm, q if whole else attention.head_size),
            (LayerWord.K_NORM, attention.k_norm, kv if whole else attention.head_size),
        ):
            self._set_norm(words, word, norm, size, read)
        words[LayerWord.NORMS_WHOLE_ROW] = attention.norms_whole_row
        words[LayerWord.ACTIVATION] = ACTIVATIONS.index(mlp.activation)
        words[LayerWord.RESIDUAL_MULTIPLIER] = float_bits(layer.residual_multiplier)
        products = {
            LayerWord.QKV: read_product(read, [attention.q, attention.k, attention.v], form),
            LayerWord.OUT: read_product(read, [attention.out], form),
            LayerWord.GATE_UP: read_gated_product(read, mlp.gate, mlp.up, form),
            LayerWord.DOWN: read_product(read, [mlp.down], form),
        }
        # Compiled code trusts these sizes.
        require_size(products[LayerWord.QKV], attention.q, q + 2 * kv, hidden)
        require_size(products[LayerWord.OUT], attention.out, hidden, q)
        gated = products[LayerWord.GATE_UP].packed.outputs // 2
        require_size(products[LayerWord.GATE_UP], mlp.gate, 2 * gated, hidden)
        inner = products[LayerWord.DOWN].packed.inputs
        require_size(products[LayerWord.DOWN], mlp.down, hidden, inner if padded(inner, PANEL) == gated else gated)
        for word, product in products.items():
            self._set_product(words, word, product)
        return [product.packed.padded_outputs for product in products.values()]

    def _set_norm(self, words: NDArray[np.int64], word: int, norm: Norm | None, size: int, read: ReadWeight) -> None:
        if norm is None:
            return
        gain = np.ascontiguousarray(floats(read_weight(read, norm.gain)) + np.float32(norm.offset))
        if gain.shape != (size,):
            raise ModelError(f"the norm {norm.gain.name} has {gain.size} gains, and must have {size}: {ANOTHER_MODEL}")
        self._kept.append(gain)
        words[word : word + 2] = gain.ctypes.data, float_bits(norm.eps)

    def _set_product(self, words: NDArray[np.int64], word: int, product: Product) -> None:
        self._kept.append(product)
        words[word : word + len(ProductWord)] = product.words()

    def _set(self, values: dict[PassWord, int]) -> None:
        for word, value in values.items():
            self._job[word] = value

    def _grow(self, rows: int) -> None:
        """Make room for this many rows. Padding columns are zero and stay so."""
        if self._buffers and rows <= len(self._buffers[PassWord.X]):
            return
        capacity = padded(rows, 16) if self._buffers else max(rows, 16)
        strides = {**self._strides, PassWord.CHOSEN: self._strides[PassWord.X]}
        # All or none: without memory for one of them, the earlier ones stay.
        self._buffers = {word: np.zeros((capacity, stride), np.float32) for word, stride in strides.items()}
        for word, buffer in self._buffers.items():
            self._job[word] = buffer.ctypes.data
        qkv, shape, jobs = self._buffers[PassWord.QKV], self.memory.shape, self.memory.jobs
        key = shape.heads * shape.head_size
        value = key + shape.kv_heads * shape.head_size
        for input_, column in ((AttentionWord.QUERY, 0), (AttentionWord.KEY, key), (AttentionWord.VALUE, value)):
            jobs[:, input_] = qkv.ctypes.data + 4 * column
        for stride_word in (AttentionWord.QUERY_STRIDE, AttentionWord.KEY_STRIDE, AttentionWord.VALUE_STRIDE):
            jobs[:, stride_word] = qkv.shape[1]
        jobs[:, AttentionWord.OUT] = self._buffers[PassWord.ATTENDED].ctypes.data
        jobs[:, AttentionWord.OUT_STRIDE] = self._strides[PassWord.ATTENDED]


def _strides(shape: KvShape, hidden_size: int, most_outputs: int) -> dict[PassWord, int]:
    """Return the columns of each buffer. most_outputs: of any product of a layer."""
    return {
        PassWord.X: padded(hidden_size, SCALE_BLOCK),
        PassWord.NORMED: padded(hidden_size, SCALE_BLOCK),
        PassWord.QKV: padded((shape.heads + 2 * shape.kv_heads) * shape.head_size, 2 * PANEL),
        PassWord.ATTENDED: padded(shape.heads * shape.head_size, SCALE_BLOCK),
        PassWord.PRODUCT: most_outputs,
        PassWord.GATED: most_outputs // 2,
    }


class _RotationTables:
    """Tables of cosines and sines, one pair per rope, as long as the longest session needs."""

    def __init__(self, ropes: Sequence[Rope | None]) -> None:
        self._ropes = ropes
        self._length = 0
        self._tables: dict[Rope, tuple[Floats, Floats]] = {}

    def cover(self, length: int, layers: NDArray[np.int64]) -> None:
        """Have positions up to `length`, and set the layers' words."""
        if length <= self._length:
            return
        longer = max(1024, 1 << (length - 1).bit_length())
        self._tables = {rope: rotation_table(rope, longer) for rope in {rope for rope in self._ropes if rope}}
        self._length = longer
        for words, rope in zip(layers, self._ropes, strict=True):
            if rope:
                cosines, sines = self._tables[rope]
                words[LayerWord.COSINES], words[LayerWord.SINES] = cosines.ctypes.data, sines.ctypes.data
                words[LayerWord.PAIRS] = len(rope.inverse_frequencies)
