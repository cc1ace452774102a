"""Matrix products of torch whose bits depend neither on the number of rows nor on that of threads.

Only module code needs this: the compiled pass sums in one order for any number of rows.

Libraries choose among kernels by shape, and different kernels sum in different orders. Measured with torch 2.13 on a
CPU with AVX-512 and bfloat16 instructions: in bfloat16 only a single row may differ from many (so 2), in float32 one to
three rows do, and with two threads other odd counts (so 4 or 8). Other machines may differ, and smaller padding makes
decode steps faster, so every `ModulePass` measures its own machine at the start, in a fraction of a second.

Many rows are multiplied a few at a time, as every library changes its kernel somewhere beyond; where depends on the
weight. `RowPadding` says how many, and to which multiple fewer rows are padded. In bfloat16 on a CPU with AMX that is
64, as smaller products are computed by other instructions; in float32 on such a CPU two threads share the sums of
products of 57 rows and more, so it is 32.

Functions such as exp have two versions, one for vectors and one for the elements that are left at the end of a thread's
part. `PaddedRows` fills the elements up, so that none are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MOST_ROWS = (64, 32, 16)
"""Candidates for the most rows that are multiplied at a time."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
"""Candidates for the multiple that rows are padded to."""

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
    """A way to multiply rows: padded to a multiple, and at most so many at a time, which is a multiple too."""

    multiple: int
    most: int


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

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.products: set[WeightProduct] = set()
        self.unknown: set[str] = set()
        """Names of functions that multiply by weights in a way that is not checked."""
        self._storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _OPERANDS or function in _UNKNOWN:
            self._record(function, args, kwargs or {})
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
        self.products.add(
            WeightProduct(function, tuple(weight.shape), weight.stride(), weight.dtype, isinstance(bias, torch.Tensor))
        )

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._storages


class PaddedRows(TorchFunctionMode):
    """While active, computes products in slices of padded rows, and functions of whole vectors for every thread."""

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
            padded = torch.nn.functional.pad(flat, (0, 0, 0, -count % self._padding.multiple))
            parts = torch.split(padded, self._padding.most, -2)
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


@torch.inference_mode()
def row_padding(products: Iterable[WeightProduct]) -> RowPadding | None:
    """Return the way in which every row has the bits that one thread computes among 64 rows.

    Of those that have, it is the one with the most rows at a time, and then with the smallest multiple. Returns None if
    there is none.
    """
    fitting = {most: [multiple for multiple in MULTIPLES if multiple <= most] for most in MOST_ROWS}
    for kind in products:
        product = kind.stand_in()
        rows = _cancelling(max(MOST_ROWS), kind.inputs, kind.dtype)
        expected = _by_one_thread(product, rows)
        same = cache(partial(_is_constant, product, rows, expected))
        for most, multiples in fitting.items():
            fitting[most] = [one for one in multiples if all(map(same, range(most, 0, -one)))]
    return next((RowPadding(multiples[0], most) for most, multiples in fitting.items() if multiples), None)


def _by_one_thread(product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return product(rows)
    finally:
        torch.set_num_threads(threads)


def _is_constant(
    product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, expected: torch.Tensor, count: int
) -> bool:
    """Return whether the first rows alone have the expected bits, in their order and in the opposite one."""
    few, bits = rows[:count], expected[..., :count, :]
    return torch.equal(product(few), bits) and torch.equal(product(few.flip(0)).flip(-2), bits)


def _cancelling(rows: int, size: int, dtype: torch.dtype, *, antisymmetric: bool = False) -> torch.Tensor:
    """Return random palindromic rows, or antisymmetric ones. The product of a row of each kind is 0."""
    half = torch.randn(rows, size // 2, generator=torch.Generator().manual_seed(size)).to(dtype)
    middle = torch.zeros(rows, size % 2).to(dtype)
    return torch.cat([half, middle, -half.flip(1) if antisymmetric else half.flip(1)], 1)
