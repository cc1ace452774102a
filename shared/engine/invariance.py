"""The row count to which torch's matrix products are padded, so that their bits do not depend on the number of rows.

Only module code needs it: the compiled pass sums in one order for any number of rows.

Libraries choose among kernels by shape, and different kernels sum in different orders. Measured with torch 2.13 on a
CPU with AVX-512 and bfloat16 instructions: in bfloat16 only a single row may differ from many (so 2), in float32 one to
three rows do, and with two threads other odd counts (so 4 or 8). Other machines may differ, and smaller padding makes
decode steps faster, so every `ModulePass` measures its own machine at the start, in a fraction of a second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from transformers.pytorch_utils import Conv1D

CANDIDATES = (1, 2, 4, 8, 16, 32)
_REFERENCE_ROWS = 64
_COUNTS = (*range(1, 10), 12, 16, 17, 24, 33, 64)


@torch.inference_mode()
def row_multiple(model: torch.nn.Module) -> int | None:
    """Return the smallest of CANDIDATES that keeps all bits constant when row counts are padded to its multiples.

    Returns None if no candidate does.
    """
    multiples = list(CANDIDATES)
    for product, size in _products(model):
        rows = _cancelling(max(_COUNTS) + max(CANDIDATES), size, next(product.parameters()))[None]
        reference = product(rows[:, :_REFERENCE_ROWS])
        same: dict[int, bool] = {}
        for multiple in list(multiples):
            for count in {-(-count // multiple) * multiple for count in _COUNTS}:
                if count not in same:
                    few = min(count, _REFERENCE_ROWS)
                    same[count] = torch.equal(product(rows[:, :count])[:, :few], reference[:, :few])
                if not same[count]:
                    multiples.remove(multiple)
                    break
    return multiples[0] if multiples else None


def _products(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, int]]:
    """Yield a stand-in for each shape of matrix product in the model, with its number of inputs.

    Its weights make every sum cancel. Only rounding errors remain, so any other order of summation shows. With the real
    weights, rounding the result to bfloat16 would hide nearly all differences in this small number of rows.
    """
    seen = set()
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        shape = tuple(module.weight.shape)
        if (type(module), shape) in seen:
            continue
        seen.add((type(module), shape))
        inputs, outputs = shape if isinstance(module, Conv1D) else shape[::-1]
        weight = _cancelling(min(outputs, 64), inputs, module.weight, antisymmetric=True).repeat(-(-outputs // 64), 1)
        stand_in = copy.copy(module)
        stand_in._parameters = dict(module._parameters)
        weight = weight[:outputs].T.contiguous() if isinstance(module, Conv1D) else weight[:outputs].contiguous()
        stand_in._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            stand_in._parameters["bias"] = torch.nn.Parameter(torch.zeros_like(module.bias), requires_grad=False)
        yield stand_in, inputs


def _cancelling(rows: int, size: int, like: torch.Tensor, *, antisymmetric: bool = False) -> torch.Tensor:
    """Return random palindromic rows, or antisymmetric ones. The product of a row of each kind is 0."""
    half = torch.randn(rows, size // 2, generator=torch.Generator().manual_seed(size)).to(like)
    middle = torch.zeros(rows, size % 2).to(like)
    return torch.cat([half, middle, -half.flip(1) if antisymmetric else half.flip(1)], 1)
