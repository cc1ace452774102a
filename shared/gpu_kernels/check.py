"""Checks at load, on the device itself: products have the bits of any tile, and sessions those of any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shared.gpu_kernels.contracts import Graphs
from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.plan import ROW_TILE
from shared.gpu_kernels.products import NARROW, WIDE
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK


def settle(decoder: GpuDecoder, blocks: int, tokens: int, graphs: Callable[[GpuDecoder], Graphs] | None = None) -> bool:
    """Choose wide tiles and graphs where they change no bit; return whether bits are independent of the batch.

    blocks, tokens: as in `batches_agree`. graphs: makes the graphs of a decoder; None to go without.
    """
    decoder.wide_tiles = tiles_agree(decoder)
    exact = batches_agree(decoder, blocks, tokens)
    if not exact and decoder.wide_tiles:
        decoder.wide_tiles = False
        exact = batches_agree(decoder, blocks, tokens)
    if graphs is not None:
        decoder.graphs = graphs(decoder)
        if exact and not batches_agree(decoder, blocks, tokens):
            decoder.graphs = None
    return exact


def tiles_agree(decoder: GpuDecoder) -> bool:
    """Return whether products of every shape of the model have the same bits in wide tiles as in narrow ones."""
    generator = torch.Generator().manual_seed(0)
    for product in decoder.products():
        x = torch.randn(ROW_TILE, product.depth, generator=generator).to(product.weight)
        if not torch.equal(decoder.multiply_rows(product, x, WIDE), decoder.multiply_rows(product, x, NARROW)):
            return False
    return True


def batches_agree(decoder: GpuDecoder, blocks: int, tokens: int) -> bool:
    """Return whether a session's last logits have the same bits in one pass, decoded, verified, and among others.

    blocks: capacity of the decoder's cache, of which the check takes the first ones and leaves zeros. tokens: length of
    the session, which is shorter if it would not leave a block for another one.
    """
    length = min(tokens, max((blocks - 1) * BLOCK, BLOCK), decoder.model.max_len)
    table = list(range(-(-length // BLOCK)))
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, decoder.model.vocab_size, (length,), generator=generator).tolist()
    tail = min(15, length - 1)
    start = length - tail

    def logits(batch: PackedBatch, new: Sequence[int], wanted: range) -> torch.Tensor:
        return decoder.forward(batch, tokens=new, wanted=wanted)[1]

    expected = logits(PackedBatch([table], [0], [length]), text, range(start, length))
    same = True
    for joins in (True, False):
        decoder.joins_runs = joins
        for counts in ([1] * tail, [min(5, tail), tail - min(5, tail)]):
            place = start
            for count in filter(None, counts):
                step = text[place : place + count]
                found = logits(PackedBatch([table], [place], [count]), step, range(count))
                same = same and torch.equal(found, expected[place - start : place - start + count])
                place += count
    decoder.joins_runs = None
    if blocks > len(table):
        other = text[: min(9, length)]
        batch = PackedBatch([[len(table)], table], [0, start], [len(other), tail])
        found = logits(batch, [*other, *text[start:]], range(len(other), len(other) + tail))
        same = same and torch.equal(found, expected)
    for block in (*table, len(table)):
        if block < blocks:
            for view in decoder.views(block):
                view.zero_()
    return same
