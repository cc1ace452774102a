"""Matrix products of torch whose bits depend neither on the number of rows nor on that of threads.

Only module code needs this: the compiled pass sums in one order for any number of rows.

Libraries choose among kernels by shape, and different kernels sum in different orders. Measured with torch 2.13 on a
CPU with AVX-512 and bfloat16 instructions: in bfloat16 only a single row may differ from many (so 2), in float32 one to
three rows do, and with two threads other odd counts (so 4 or 8). Other machines may differ, and smaller padding makes
decode steps faster, so every `ModulePass` measures its own machine at the start, in a fraction of a second.

The packed row is padded to such a multiple. A mixture of experts multiplies other numbers of rows, as tokens choose
their experts: `PaddedRows` pads these one by one.

Sometimes no multiple helps: in bfloat16 on a CPU with AMX, small products are computed by other instructions; in
float32 on such a CPU, two threads share the sums of large products. `PaddedRows` then multiplies a few rows at a time.

Functions such as exp have two versions, one for vectors and one for the elements that are left at the end of a thread's
part. `PaddedRows` fills the elements up, so that none are left, where a row's width does not do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CANDIDATES = (1, 2, 4, 8, 16, 32)
SLICES = (16, 32, 64)
"""Numbers of rows to multiply at a time where no candidate will do: one kernel computes all products of a shape."""
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
VECTOR = 64
"""A multiple of the elements that any CPU computes at a time: two registers of bfloat16."""
_GRAIN = 32768
"""torch gives a thread at least so many elements of a function."""
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
class RowPadding:
    """A way to multiply rows: padded to a multiple, and if `sliced`, no more of them at a time."""

    multiple: int
    sliced: bool = False


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
        self._rows, self._unit = rows, VECTOR * lcm(*range(1, threads + 1))
        self._storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _OPERANDS or function in _UNKNOWN:
            self._record(function, args, kwargs or {})
        elif function in _POINTWISE:
            self.uneven |= _is_matrix(args) and args[0].shape[-1] % self._unit != 0
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
    """While active, pads the rows of every product to a multiple, and elements to whole vectors for every thread.

    If the padding is sliced, every product is computed in slices of that many rows.
    """

    def __init__(self, padding: RowPadding, threads: int) -> None:
        super().__init__()
        self._padding, self._threads = padding, threads

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _OPERANDS and len(args) > 1:
            rows_at, _ = _OPERANDS[function]
            rows: torch.Tensor = args[rows_at]
            is_linear = function is torch.nn.functional.linear
            flat = rows.reshape(-1, rows.shape[-1]) if is_linear else rows
            count = flat.shape[-2]
            multiple = self._padding.multiple
            padded = torch.nn.functional.pad(flat, (0, 0, 0, -count % multiple))
            parts = torch.split(padded, multiple, -2) if self._padding.sliced else (padded,)
            if len(parts) > 1 or padded.shape[-2] > count:
                results = [function(*args[:rows_at], part, *args[rows_at + 1 :], **(kwargs or {})) for part in parts]
                result = torch.cat(results, -2)[..., :count, :]
                return result.reshape(*rows.shape[:-1], result.shape[-1]) if is_linear else result
        elif function in _POINTWISE and _is_matrix(args):
            elements: torch.Tensor = args[0].flatten()
            missing = _whole_vectors(len(elements), self._threads) - len(elements)
            if missing or not args[0].is_contiguous():
                padded = torch.nn.functional.pad(elements, (0, missing))
                return function(padded, *args[1:], **(kwargs or {}))[: len(elements)].view(args[0].shape)
        return function(*args, **(kwargs or {}))


def _is_matrix(args: Sequence[Any]) -> bool:
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].dim() > 1


def _whole_vectors(count: int, threads: int) -> int:
    """Return the least number of elements, `count` or more, of which every thread gets whole vectors."""
    while count % (unit := VECTOR * max(1, min(threads, -(-count // _GRAIN)))):
        count += -count % unit
    return count


def _row_count(rows: torch.Tensor) -> int:
    return rows.shape[:-1].numel()


@torch.inference_mode()
def row_padding(products: Iterable[WeightProduct]) -> RowPadding | None:
    """Return the least padding with which every row has the bits that one thread computes among many rows.

    That is the smallest of CANDIDATES or else of SLICES, or None if none will do.
    """
    multiples, slices = list(CANDIDATES), list(SLICES)
    for kind in products:
        product = kind.stand_in()
        rows = _cancelling(max(_COUNTS) + max(CANDIDATES), kind.inputs, kind.dtype)
        reference = _by_one_thread(product, rows[:_REFERENCE_ROWS])
        slices = [size for size in slices if _is_constant(product, rows[:size], reference[..., :size, :])]
        same: dict[int, bool] = {}
        for multiple in list(multiples):
            for count in {-(-count // multiple) * multiple for count in _COUNTS}:
                if count not in same:
                    few = min(count, _REFERENCE_ROWS)
                    same[count] = torch.equal(product(rows[:count])[..., :few, :], reference[..., :few, :])
                if not same[count]:
                    multiples.remove(multiple)
                    break
    if multiples:
        return RowPadding(multiples[0])
    return RowPadding(slices[0], sliced=True) if slices else None


def _by_one_thread(product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return product(rows)
    finally:
        torch.set_num_threads(threads)


def _is_constant(product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether these rows have the expected bits, in this order and in the opposite one."""
    return torch.equal(product(rows), expected) and torch.equal(product(rows.flip(0)).flip(-2), expected)


def _cancelling(rows: int, size: int, dtype: torch.dtype, *, antisymmetric: bool = False) -> torch.Tensor:
    """Return random palindromic rows, or antisymmetric ones. The product of a row of each kind is 0."""
    half = torch.randn(rows, size // 2, generator=torch.Generator().manual_seed(size)).to(dtype)
    middle = torch.zeros(rows, size % 2).to(dtype)
    return torch.cat([half, middle, -half.flip(1) if antisymmetric else half.flip(1)], 1)
