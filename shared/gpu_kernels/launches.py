"""Launches of kernels: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any, Final, Protocol

Grid = tuple[int, ...]
OPTIONS: Final = {"enable_fp_fusion": False}
"""Options of every kernel. Contraction would let the same expression round differently in two kernels."""


class Launcher(Protocol):
    """Runs kernels."""

    def __call__(self, kernel: Any, grid: Grid, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel over a grid. constants: its compile-time arguments, `num_warps` and `num_stages`."""


def launch(kernel: Any, grid: Grid, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its tensors; the interpreter ignores the options."""
    kernel[grid](*arguments, **constants, **OPTIONS)
