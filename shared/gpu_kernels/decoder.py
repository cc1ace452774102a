"""A described model's whole forward pass by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from shared.gpu_kernels import source
from shared.gpu_kernels.contracts import Announce, Graphs, Peers
from shared.gpu_kernels.launches import Launcher, launch
from shared.gpu_kernels.parts import head_columns
from shared.gpu_kernels.plan import (
    ALIGNMENT,
    ROW_SECTIONS,
    ROW_TILE,
    RUN_FLOATS,
    LaunchPlan,
    plan_batch,
    width,
)
from shared.gpu_kernels.products import (
    DTYPES,
    NARROW,
    WIDE,
    WIDE_FROM,
    DeviceProduct,
    ProductTiles,
    ReadWeight,
)
from shared.gpu_kernels.rotations import DeviceRotations
from shared.gpu_kernels.weights import DeviceLayer, DeviceModel, DeviceNorm
from shared.kernels.cache import PackedBatch
from shared.kernels.formats import padded
from shared.kernels.layout import BLOCK
from shared.models.description import AttentionDescription, ModelDescription

RUN: Final[int] = source.SPLIT.value
"""Tokens of a run of keys."""
_WARPS: Final = {"num_warps": 4, "num_stages": 2}


class GpuDecoder:
    """A described model and its KV on a device.

    The bits of a row's states and logits depend on the weights and on the row's session alone (`source`). Activations
    between products are float32, operands have the weights' format. Not thread-safe.
    """

    def __init__(
        self,
        model: ModelDescription,
        read: ReadWeight,
        *,
        form: str,
        blocks: int,
        torch_device: torch.device,
        launcher: Launcher = launch,
        peers: Peers | None = None,
        announce: Announce | None = None,
    ) -> None:
        """form: of weights, keys and values (`DTYPES`). blocks: capacity of the cache, `BLOCK` tokens each. peers: the
        GPUs of which this one computes its part, which `model` describes; None for a whole model. announce: called with
        each batch before it is computed.
        """
        self.model, self.torch_device = model, torch_device
        self.wide_tiles = False
        """True if products of many rows take wide tiles. Set after a check that they have the bits of narrow ones."""
        self.joins_runs: bool | None = None
        """Compute the runs of a long session in parallel; None to decide by the batch. No bit depends on it."""
        self.graphs: Graphs | None = None
        """Graphs of steps of few rows; None to launch every kernel."""
        self.moves = 0
        """Number of times that a buffer has got another address."""
        self._launch, self._dtype = launcher, DTYPES[form]
        self._peers, self._announce = peers, announce
        self._logit_columns = head_columns(model.vocab_size, peers.ranks if peers else 1)
        first = model.layers[0].attention
        self._heads, self._kv_heads, self._head_size = first.heads, first.kv_heads, first.head_size
        self._group = self._heads // self._kv_heads
        self._lanes = width(self._group, ROW_TILE)
        shape = (len(model.layers), blocks, self._kv_heads, BLOCK, self._head_size)
        self.keys = torch.zeros(shape, dtype=self._dtype, device=torch_device)
        self.values = torch.zeros(shape, dtype=self._dtype, device=torch_device)
        self._weights = DeviceModel(model, read, form, torch_device)
        self._layers, self._head = self._weights.layers, self._weights.head
        self._ropes = DeviceRotations({layer.attention.rope for layer in model.layers}, torch_device)
        self._capacity = 0
        self._grow(ROW_TILE)

    def views(self, block: int) -> Sequence[torch.Tensor]:
        """Return views of a block's keys and values in all layers."""
        return [self.keys[:, block], self.values[:, block]]

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""
        for held in (self.keys, self.values):
            held[:, target] = held[:, source]

    def clear_block(self, block: int) -> None:
        """Set a block's keys and values to zero."""
        for view in self.views(block):
            view.zero_()

    def forward(
        self, batch: PackedBatch, *, tokens: Sequence[int], wanted: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a packed batch and keep its KV.

        Returns the last norm's output (tokens, hidden size), a view that the next call overwrites, and logits of the
        wanted rows, new (wanted, vocabulary).
        """
        if self._announce:
            self._announce(batch, tokens, wanted)
        rows = sum(batch.counts)
        self._grow(max(rows, len(wanted)))
        plan = plan_batch(
            batch,
            tokens,
            wanted,
            capacity=self._capacity,
            span_tokens=self._lanes // self._group,
            run=RUN,
        )
        self._upload(plan)
        self._cover(plan.runs)
        logits = self.graphs.logits(rows, plan.runs) if self.graphs and wanted else None
        if logits is not None:
            return self._states[:rows], self._joined(logits[: len(wanted)]).clone()
        self.launch_layers(rows, plan.spans, plan.runs)
        logits = self.empty_logits(len(wanted))
        self.launch_head(len(wanted), logits)
        return self._states[:rows], self._joined(logits[: len(wanted)])

    def _joined(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the whole vocabulary's logits."""
        if self._peers and len(logits):
            logits = self._peers.join(logits)
        return logits[:, : self.model.vocab_size]

    def reserve(self, rows: int, runs: int) -> None:
        """Make room for batches of this many rows and runs of keys, and leave an inert batch in the buffers."""
        self._grow(rows)
        self._cover(runs)
        self._words.zero_()
        self._section(2)[: self._capacity] = -1

    def launch_layers(self, rows: int, spans: int, runs: int) -> None:
        """Launch the kernels from the embedding to the last norm, for the batch in the buffers."""
        size, stride = self.model.hidden_size, self._x.shape[1]
        self._launch(
            source.embed,
            (rows,),
            self._x,
            self._section(0),
            self._weights.embedding.weight,
            SIZE=size,
            X_STRIDE=stride,
            EMBEDDING_STRIDE=self._weights.embedding.depth,
            WIDTH=width(size),
            MULTIPLIER=self.model.embedding_multiplier,
            **_WARPS,
        )
        norms = [layer.attention_norm for layer in self._layers[1:]]
        self._add_and_norm(rows, None, 1.0, None, self._layers[0].attention_norm)
        for number, layer in enumerate(self._layers):
            factor = layer.description.residual_multiplier
            self._multiply(rows, self._normed, layer.qkv, self._qkv)
            self._attend(number, layer, rows, spans, runs)
            self._multiply_and_add(rows, self._attended, layer.out)
            self._add_and_norm(rows, self._product, factor, layer.attention_post_norm, layer.mlp_norm)
            self._multiply_gated(rows, layer)
            self._multiply_and_add(rows, self._gated, layer.down)
            last = number == len(self._layers) - 1
            norm = self._weights.norm if last else norms[number]
            self._add_and_norm(rows, self._product, factor, layer.mlp_post_norm, norm, keeps=last)

    def empty_logits(self, rows: int) -> torch.Tensor:
        """Return a buffer for the logits of this many rows, up to whole tiles."""
        return torch.empty(padded(rows, ROW_TILE), self._logit_columns, device=self.torch_device)

    def launch_head(self, wanted: int, logits: torch.Tensor) -> None:
        """Launch the head for the first wanted rows in the buffers."""
        model = self.model
        if wanted:
            self._multiply(
                wanted, self._normed, self._head, logits, self._section(3), model.logit_multiplier, model.logit_softcap
            )

    def multiply_rows(self, product: DeviceProduct, x: torch.Tensor, tiles: ProductTiles | None = None) -> torch.Tensor:
        """Return x @ weight^T + bias of rows up to a whole tile, for checks of tiles."""
        out = torch.empty(len(x), product.padded_outputs, device=self.torch_device)
        self._multiply(len(x), x, product, out, tiles=tiles)
        return out

    def multiply_into(self, rows: int, x: torch.Tensor, product: DeviceProduct, out: torch.Tensor) -> None:
        """Compute x @ weight^T + bias of some rows as a step of so many does. x, out: rows up to a whole tile."""
        self._multiply(rows, x, product, out)

    def products(self) -> list[DeviceProduct]:
        """Return one product of each shape."""
        return self._weights.products()

    def _grow(self, rows: int) -> None:
        """Make room for this many rows. Padding columns are zero and stay so."""
        if rows <= self._capacity:
            return
        self.moves += 1
        capacity = padded(max(rows, 2 * self._capacity), ROW_TILE)
        layer = self._layers[0]
        self._x = self._empty((capacity, self.model.hidden_size), torch.float32)
        self._states = self._empty((capacity, self.model.hidden_size), torch.float32)
        self._normed = self._empty((capacity, layer.qkv.depth), self._dtype)
        self._qkv = self._empty((capacity, layer.qkv.padded_outputs), torch.float32)
        self._query = self._empty((capacity, self._heads * self._head_size), self._dtype)
        self._attended = self._empty((capacity, layer.out.depth), self._dtype)
        self._product = self._empty((capacity, layer.out.padded_outputs), torch.float32)
        inner = max(one.gate.padded_outputs for one in self._layers)
        self._gated = self._empty((capacity, inner), self._dtype)
        self._run_mixed, self._run_sums = self._empty(0, torch.float32), self._empty(0, torch.float32)
        self._words = self._empty(ROW_SECTIONS * capacity, torch.int32)
        self._capacity = capacity

    def _upload(self, plan: LaunchPlan) -> None:
        if len(plan.words) > len(self._words):
            self.moves += 1
            self._words = self._empty(padded(2 * len(plan.words), ALIGNMENT), torch.int32)
        self._words[: len(plan.words)].copy_(torch.from_numpy(plan.words), non_blocking=True)

    def _cover(self, runs: int) -> None:
        self.moves += self._ropes.cover(runs * RUN)

    def _section(self, number: int) -> torch.Tensor:
        return self._words[number * self._capacity :]

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def _tiles(self, rows: int) -> ProductTiles:
        return WIDE if self.wide_tiles and rows >= WIDE_FROM else NARROW

    def _multiply(
        self,
        rows: int,
        x: torch.Tensor,
        product: DeviceProduct,
        out: torch.Tensor,
        chosen: torch.Tensor | None = None,
        multiplier: float = 1.0,
        softcap: float = 0.0,
        tiles: ProductTiles | None = None,
    ) -> None:
        options = product.options(tiles or self._tiles(rows))
        self._launch(
            source.multiply,
            (-(-rows // options["BLOCK_M"]), product.padded_outputs // options["BLOCK_N"]),
            x,
            product.weight,
            self._x if product.bias is None else product.bias,
            self._words if chosen is None else chosen,
            out,
            X_STRIDE=x.shape[1],
            OUT_STRIDE=out.shape[1],
            HAS_BIAS=product.bias is not None,
            CHOOSES=chosen is not None,
            MULTIPLIER=multiplier,
            SOFTCAP=softcap,
            **options,
        )

    def _multiply_and_add(self, rows: int, x: torch.Tensor, product: DeviceProduct) -> None:
        """Compute a product whose inputs are split among the peers."""
        self._multiply(rows, x, product, self._product)
        if self._peers:
            self._peers.add(self._product[:rows])

    def _multiply_gated(self, rows: int, layer: DeviceLayer) -> None:
        gate, up = layer.gate, layer.up
        options = gate.options(self._tiles(rows), gated=True)
        self._launch(
            source.multiply_gated,
            (-(-rows // options["BLOCK_M"]), gate.padded_outputs // options["BLOCK_N"]),
            self._normed,
            gate.weight,
            up.weight,
            self._x if gate.bias is None else gate.bias,
            self._x if up.bias is None else up.bias,
            self._gated,
            X_STRIDE=self._normed.shape[1],
            OUT_STRIDE=self._gated.shape[1],
            HAS_BIAS=gate.bias is not None,
            ACTIVATION=layer.description.mlp.activation,
            **options,
        )

    def _add_and_norm(
        self,
        rows: int,
        added: torch.Tensor | None,
        multiplier: float,
        post_norm: DeviceNorm | None,
        norm: DeviceNorm | None,
        *,
        keeps: bool = False,
    ) -> None:
        size = self.model.hidden_size
        self._launch(
            source.add_and_norm,
            (rows,),
            self._x,
            self._x if added is None else added,
            post_norm.gain if post_norm else self._x,
            norm.gain if norm else self._x,
            self._normed,
            self._states,
            SIZE=size,
            X_STRIDE=self._x.shape[1],
            ADDED_STRIDE=0 if added is None else added.shape[1],
            NORMED_STRIDE=self._normed.shape[1],
            WIDTH=width(size),
            ADDS=added is not None,
            POST_NORMS=post_norm is not None,
            NORMS=norm is not None,
            KEEPS=keeps,
            MULTIPLIER=multiplier,
            POST_EPS=post_norm.eps if post_norm else 0.0,
            EPS=norm.eps if norm else 0.0,
            **_WARPS,
        )

    def _attend(self, number: int, layer: DeviceLayer, rows: int, spans: int, runs: int) -> None:
        attention = layer.description.attention
        self._rotate_and_store(number, layer, rows)
        floats = rows * self._heads * runs
        joins = self.joins_runs
        if joins is None:
            joins = floats * self._head_size <= RUN_FLOATS
        if joins and len(self._run_sums) < 2 * floats:
            self.moves += 1
            self._run_mixed = self._empty(floats * self._head_size, torch.float32)
            self._run_sums = self._empty(2 * floats, torch.float32)
        shape: dict[str, Any] = {
            "OUT_STRIDE": self._attended.shape[1],
            "KV_HEADS": self._kv_heads,
            "GROUP": self._group,
            "HEAD_SIZE": self._head_size,
            "HEAD_WIDTH": width(self._head_size, 16),
            "WINDOW": min(attention.window, 1 << 30),
        }
        self._launch(
            source.attend,
            (spans, self._kv_heads, runs if joins else 1),
            self._query,
            self.keys[number],
            self.values[number],
            self._section(4),
            self._section(ROW_SECTIONS),
            self._attended,
            self._run_mixed,
            self._run_sums,
            1 if joins else runs,
            runs,
            int(not joins),
            Q_STRIDE=self._query.shape[1],
            SCALE=attention.scale,
            SOFTCAP=attention.softcap,
            BLOCK_M=self._lanes,
            **shape,
            num_warps=4 if self._head_size <= 64 else 8,
            num_stages=2,
        )
        if joins:
            self._launch(
                source.join,
                (rows, self._kv_heads),
                self._section(1),
                self._attended,
                self._run_mixed,
                self._run_sums,
                runs,
                GROUP_WIDTH=width(self._group),
                **shape,
                **_WARPS,
            )

    def _rotate_and_store(self, number: int, layer: DeviceLayer, rows: int) -> None:
        attention: AttentionDescription = layer.description.attention
        cosines, sines = self._ropes.tables(attention.rope)
        self._launch(
            source.rotate_and_store,
            (rows,),
            self._qkv,
            self._section(1),
            self._section(2),
            layer.q_norm.gain if layer.q_norm else self._x,
            layer.k_norm.gain if layer.k_norm else self._x,
            cosines,
            sines,
            self._query,
            self.keys[number],
            self.values[number],
            QKV_STRIDE=self._qkv.shape[1],
            Q_STRIDE=self._query.shape[1],
            HEADS=self._heads,
            HEADS_WIDTH=width(self._heads),
            KV_HEADS=self._kv_heads,
            KV_WIDTH=width(self._kv_heads),
            HEAD_SIZE=self._head_size,
            HEAD_WIDTH=width(self._head_size, 16),
            NORMS_Q=layer.q_norm is not None,
            NORMS_K=layer.k_norm is not None,
            WHOLE=attention.norms_whole_row,
            Q_EPS=layer.q_norm.eps if layer.q_norm else 0.0,
            K_EPS=layer.k_norm.eps if layer.k_norm else 0.0,
            PAIRS=len(attention.rope.inverse_frequencies) if attention.rope else 0,
            **_WARPS,
        )
