"""Finds out to which row count a model's matrix products must be padded for their bits not to depend on that count.

Libraries choose among kernels by shape, and different kernels sum in different orders. Measured with torch 2.13 on a
CPU with AVX-512 and bfloat16 instructions: in bfloat16 only a single row may differ from many (so 2), in float32 one to
three rows do, and with two threads other odd counts (so 4 or 8). Other machines may differ, and the smaller the padding
the faster a decode step, so every engine asks its own machine at the start; that takes a fraction of a second.
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
    """The smallest of CANDIDATES to whose multiples all row counts must be padded; None if none makes the bits
    constant."""
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
    """A stand-in for each shape of matrix product in the model, and its number of inputs.

    Its weights make every sum cancel: what is left of it is rounding, so any other order of summation shows. With the
    real weights the rounding of the result to bfloat16 would hide nearly all differences from so few rows.
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
    """Random rows that read the same backwards, with the sign turned if antisymmetric: products of the two kinds are
    0."""
    half = torch.randn(rows, size // 2, generator=torch.Generator().manual_seed(size)).to(like)
    middle = torch.zeros(rows, size % 2).to(like)
    return torch.cat([half, middle, -half.flip(1) if antisymmetric else half.flip(1)], 1)
