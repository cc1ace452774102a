"""CUDA graphs: all launches of a step as one, for a ladder of numbers of rows and of runs of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch

from shared.gpu_kernels.decoder import RUN, GpuDecoder
from shared.kernels.layout import BLOCK

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of the graphs. A batch takes the next larger one, whose other rows are inert; one of more rows takes none."""
RUNS: Final = (1, 4, 16, 64, 256, 1024)
"""Runs of keys of the graphs."""
Replay = Callable[[], object]
Rung = tuple[int, int]
"""Rows and runs of a graph."""


def capture_on_gpu(compute: Callable[[], object]) -> Replay:
    """Capture the launches of a function, which is not computed, and return what computes them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


def prepared_graphs(decoder: GpuDecoder) -> StepGraphs:
    """Return the graphs of a decoder on a GPU, captured."""
    graphs = StepGraphs(decoder)
    graphs.prepare()
    return graphs


class StepGraphs:
    """The graphs of a decoder.

    A graph keeps the addresses of the decoder's buffers. When one of them has moved, for a larger batch than any
    before, each graph is captured again at its next use.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        *,
        rows: Sequence[int] = ROWS,
        capture: Callable[[Callable[[], object]], Replay] = capture_on_gpu,
    ) -> None:
        """rows: ascending."""
        self._decoder, self._rows, self._capture = decoder, rows, capture
        self._replays: dict[Rung, Replay] = {}
        self._moves = -1
        self._logits = decoder.empty_logits(rows[-1])

    def prepare(self) -> None:
        """Capture every graph that a session can need: the model's maximum length and the cache limit it."""
        decoder = self._decoder
        most = -(-min(decoder.model.max_len, decoder.keys.shape[1] * BLOCK) // RUN)
        decoder.reserve(self._rows[-1], most)
        last = next(number for number, runs in enumerate(RUNS) if runs >= most or runs == RUNS[-1])
        # The largest first: buffers move at most once.
        for runs in reversed(RUNS[: last + 1]):
            for rows in reversed(self._rows):
                self.logits(rows, runs)

    def rung(self, rows: int, runs: int) -> Rung | None:
        """Return the least graph for this many rows and runs; None beyond the ladder."""
        if rows > self._rows[-1] or runs > RUNS[-1]:
            return None
        return min(one for one in self._rows if one >= rows), min(one for one in RUNS if one >= runs)

    def logits(self, rows: int, runs: int) -> torch.Tensor | None:
        """Compute the batch in the decoder's buffers; return the logits of its wanted rows, which the next call
        overwrites. None if the batch is beyond the ladder."""
        if (rung := self.rung(rows, runs)) is None:
            return None
        if rung not in self._replays or self._moves != self._decoder.moves:
            self._compute(rung)  # compiles the kernels, and makes room
            if self._moves != self._decoder.moves:
                self._replays.clear()
                self._moves = self._decoder.moves
            self._replays[rung] = self._capture(partial(self._compute, rung))
        self._replays[rung]()
        return self._logits

    def _compute(self, rung: Rung) -> None:
        rows, runs = rung
        self._decoder.launch_layers(rows, rows, runs)
        self._decoder.launch_head(rows, self._logits)
