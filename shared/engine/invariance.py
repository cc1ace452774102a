"""Matrix products of torch whose bits do not depend on the number of rows.

Only module code needs this: the compiled pass sums in one order for any number of rows.

Libraries choose among kernels by shape, and different kernels sum in different orders. Measured with torch 2.13 on a
CPU with AVX-512 and bfloat16 instructions: in bfloat16 only a single row may differ from many (so 2), in float32 one to
three rows do, and with two threads other odd counts (so 4 or 8). Other machines may differ, and smaller padding makes
decode steps faster, so every `ModulePass` measures its own machine at the start, in a fraction of a second.

The packed row is padded to such a multiple. A mixture of experts multiplies other numbers of rows, as tokens choose
their experts: `PaddedRows` pads these one by one.

Functions such as exp have two versions, one for vectors and one for the elements that are left at the end of a thread's
part. `PaddedRows` fills the elements up, so that none are left, where a row's width does not do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CANDIDATES = (1, 2, 4, 8, 16, 32)
_REFERENCE_ROWS = 64
_COUNTS = (*range(1, 10), 12, 16, 17, 24, 33, 64)

_OPERANDS: Mapping[Any, tuple[int, int]] = {
    torch.nn.functional.linear: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.addmm: (1, 2),
    torch.Tensor.addmm: (1, 2),
    torch.baddbmm: (1, 2),
}
"""Functions that multiply rows by weights: the places of rows and weights among their arguments."""
_POINTWISE: frozenset[Any] = frozenset({
    function
    for place in (torch, torch.Tensor, torch.nn.functional)
    for name in (
        "cos", "elu", "erf", "exp", "expm1", "gelu", "log", "log1p", "logsigmoid", "mish", "sigmoid", "silu", "sin",
        "softplus", "tanh",
    )
    if (function := getattr(place, name, None)) is not None
})  # fmt: skip
"""Functions of single elements that have one version for vectors and one for the remaining elements."""
VECTOR = 32
"""A multiple of the elements that any CPU computes at a time."""
_UNKNOWN: frozenset[Any] = frozenset(
    {
        torch.einsum,
        torch.nn.functional.bilinear,
        getattr(torch.nn.functional, "grouped_mm", None),
        getattr(torch, "_grouped_mm", None),
    }
)
"""Functions that may multiply by weights in ways that are not checked."""


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A kind of matrix product in a model: a function, and the layout of its weight."""

    function: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    has_bias: bool

    @property
    def inputs(self) -> int:
        return self.shape[-1] if self.function is torch.nn.functional.linear else self.shape[-2]

    def stand_in(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the product with a weight that makes every sum cancel, as a function of rows.

        Only rounding errors remain, so any other order of summation shows. With the real weights, rounding the result
        to bfloat16 would hide nearly all differences in this small number of rows.
        """
        is_linear = self.function is torch.nn.functional.linear
        outputs = self.shape[-2] if is_linear else self.shape[-1]
        part = _cancelling(min(outputs, 64), self.inputs, self.dtype, antisymmetric=True)
        values = part.repeat(-(-outputs // 64), 1)[:outputs]
        weight = values if is_linear else values.T
        if (weight.shape, weight.stride()) != (self.shape, self.strides):
            weight = torch.empty_strided(self.shape, self.strides, dtype=self.dtype).copy_(weight)
        rows_at, _ = _OPERANDS[self.function]
        bias = torch.zeros(outputs, dtype=self.dtype)

        def product(rows: torch.Tensor) -> torch.Tensor:
            if rows_at:
                result = self.function(bias, rows, weight)
            elif is_linear:
                result = self.function(rows[None], weight, bias if self.has_bias else None)[0]
            else:
                result = self.function(rows.expand(*self.shape[:-2], *rows.shape), weight)
            return result  # type: ignore[no-any-return]

        return product


class RecordedProducts(TorchFunctionMode):
    """While active, records the matrix products of a model with its weights."""

    def __init__(self, model: torch.nn.Module, rows: int, threads: int) -> None:
        """rows: number of rows of the packed batch, which every product has that needs no padding of its own."""
        super().__init__()
        self.products: set[WeightProduct] = set()
        self.unknown: set[str] = set()
        """Names of functions that multiply by weights in a way that is not checked."""
        self.uneven = False
        """True if `PaddedRows` is needed: some product has another number of rows than the packed batch, as experts
        have, or a function of elements has rows that are no whole vectors for every thread."""
        self._rows, self._unit = rows, VECTOR * threads
        self._storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _OPERANDS or function in _UNKNOWN:
            self._record(function, args, kwargs or {})
        elif function in _POINTWISE:
            self.uneven |= _leaves_elements(args, self._unit)
        return function(*args, **(kwargs or {}))

    def _record(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        of_weights = [self._is_weight(each) for each in args]
        if not any(of_weights) and function is not torch.nn.functional.linear:
            return  # of activations
        rows_at, weight_at = _OPERANDS.get(function, (0, 1))
        if function in _UNKNOWN or len(args) <= weight_at or of_weights[rows_at]:
            self.unknown.add(function.__name__)
            return
        weight: torch.Tensor = args[weight_at]
        if weight.dim() < 2 or args[rows_at].shape[-2:].numel() == 0:
            return
        bias = kwargs.get("bias", args[2] if function is torch.nn.functional.linear and len(args) > 2 else None)
        self.uneven |= _row_count(args[rows_at]) % self._rows != 0
        self.products.add(
            WeightProduct(function, tuple(weight.shape), weight.stride(), weight.dtype, isinstance(bias, torch.Tensor))
        )

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._storages


class PaddedRows(TorchFunctionMode):
    """While active, pads the rows of every product to a multiple, and elements to whole vectors for every thread."""

    def __init__(self, multiple: int, threads: int) -> None:
        super().__init__()
        self._multiple, self._unit = multiple, VECTOR * threads

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _OPERANDS and len(args) > 1:
            rows_at, _ = _OPERANDS[function]
            rows: torch.Tensor = args[rows_at]
            is_linear = function is torch.nn.functional.linear
            count = _row_count(rows) if is_linear else rows.shape[-2]
            if count % self._multiple and (rows.dim() == 2 or not is_linear):
                padded = torch.nn.functional.pad(rows, (0, 0, 0, -count % self._multiple))
                result = function(*args[:rows_at], padded, *args[rows_at + 1 :], **(kwargs or {}))
                return result[..., :count, :]
        elif function in _POINTWISE and _leaves_elements(args, self._unit):
            elements: torch.Tensor = args[0].flatten()
            padded = torch.nn.functional.pad(elements, (0, -len(elements) % self._unit))
            return function(padded, *args[1:], **(kwargs or {}))[: len(elements)].view(args[0].shape)
        return function(*args, **(kwargs or {}))


def _leaves_elements(args: Sequence[Any], unit: int) -> bool:
    """Return whether the rows of a function's argument are no multiple of the unit."""
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].dim() > 1 and args[0].shape[-1] % unit != 0


def _row_count(rows: torch.Tensor) -> int:
    return rows.shape[:-1].numel()


@torch.inference_mode()
def row_multiple(products: Iterable[WeightProduct]) -> int | None:
    """Return the smallest of CANDIDATES that keeps all bits constant when row counts are padded to its multiples.

    Returns None if no candidate does.
    """
    multiples = list(CANDIDATES)
    for kind in products:
        product = kind.stand_in()
        rows = _cancelling(max(_COUNTS) + max(CANDIDATES), kind.inputs, kind.dtype)
        reference = product(rows[:_REFERENCE_ROWS])
        same: dict[int, bool] = {}
        for multiple in list(multiples):
            for count in {-(-count // multiple) * multiple for count in _COUNTS}:
                if count not in same:
                    few = min(count, _REFERENCE_ROWS)
                    same[count] = torch.equal(product(rows[:count])[..., :few, :], reference[..., :few, :])
                if not same[count]:
                    multiples.remove(multiple)
                    break
    return multiples[0] if multiples else None


def _cancelling(rows: int, size: int, dtype: torch.dtype, *, antisymmetric: bool = False) -> torch.Tensor:
    """Return random palindromic rows, or antisymmetric ones. The product of a row of each kind is 0."""
    half = torch.randn(rows, size // 2, generator=torch.Generator().manual_seed(size)).to(dtype)
    middle = torch.zeros(rows, size % 2).to(dtype)
    return torch.cat([half, middle, -half.flip(1) if antisymmetric else half.flip(1)], 1)
