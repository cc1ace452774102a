"""Operations that numba has no name for: memory by address, vectors of floats, and what threads need.

Compiled code works on addresses (int64), not on arrays: numba would add Python's wrap-around of negative indices to
every access. A vector has `LANES` float32 lanes, and every operation works lane by lane; LLVM splits it into registers
of whatever width a CPU has. So the width never changes a result. Nothing may be reordered or fused by the compiler: no
function has a fast-math flag, and `fma` is the only fusion.

The first half is for code that writes LLVM's IR, the second half for code that numba compiles.
"""

# numba's annotations cover neither its intrinsics nor the types in compiled code.
# mypy: disable-error-code="no-untyped-call, misc, arg-type, call-arg, attr-defined, call-overload"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, get_type_hints

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES: Final = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)


# For code that writes IR: `b` is llvmlite's IRBuilder, an address is an i64.


def load(b: Any, address: Any, kind: Any) -> Any:
    """Load a value or vector that is aligned like one element."""
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = _alignment(kind)
    return value


def store(b: Any, value: Any, address: Any) -> None:
    """Store a value or vector, aligned like one element."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = _alignment(value.type)


def _alignment(kind: Any) -> int:
    element = getattr(kind, "element", kind)
    return 4 if element == F32 else element.width // 8


def constant(kind: Any, value: float) -> Any:
    """Return a constant; of a vector, in all lanes."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def repeated(b: Any, value: Any, lanes: int) -> Any:
    """Return a vector with `value` in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = b.insert_element(undefined, value, constant(I32, 0))
    return b.shuffle_vector(one, undefined, constant(ir.VectorType(I32, lanes), 0))


def multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z with one rounding, lane by lane."""
    kind = x.type
    name = f"llvm.fma.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), name), [x, y, z])


def prefetch(b: Any, address: Any) -> None:
    """Load the line of the cache at an address, valid or not, into the second level."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [b.inttoptr(address, I8.as_pointer()), *(constant(I32, flag) for flag in (0, 2, 1))])


def loop(b: Any, count: Any, carried: list[Any], body: Any) -> list[Any]:
    """Emit `for i in range(count)`, count at least 1. `body(i, values)` returns the carried values' next ones."""
    before, head, after = b.block, b.append_basic_block(), b.append_basic_block()
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    phis = [b.phi(value.type) for value in carried]
    values = body(i, phis)
    following = b.add(i, constant(I64, 1))
    for phi, first, later in zip([i, *phis], [constant(I64, 0), *carried], [following, *values], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.cbranch(b.icmp_signed("<", following, count), head, after)
    b.position_at_end(after)
    return values  # type: ignore[no-any-return]


# For code that numba compiles.

inlined = njit(error_model="numpy", inline="always")
"""Decorator of functions that are inlined where they are called."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function of integers (int64) and floats (float32), as its annotations say.

    It never raises: a division by zero gives what IEEE 754 says.
    """
    hints = get_type_hints(function)
    result = _NUMBA_TYPES[hints.pop("return")]
    signature = result(*(_NUMBA_TYPES[hint] for hint in hints.values()))
    return njit(signature, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


_NUMBA_TYPES = {int: types.int64, float: types.float32, type(None): types.void}


class VectorType(types.Type):
    """numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="Vector")


vector = VectorType()


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is one value to LLVM."""

    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


@intrinsic
def zeros(typingctx: Any) -> Any:
    """Return a vector of zeros."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return constant(VECTOR, 0.0)

    return vector(), emit


@intrinsic
def load_vector(typingctx: Any, address: Any) -> Any:
    """Load a vector of float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return load(b, args[0], VECTOR)

    return vector(types.int64), emit


@intrinsic
def vector_fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z with one rounding, lane by lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return multiply_add(b, *args)

    return vector(vector, vector, vector), emit


@intrinsic
def vector_add(typingctx: Any, x: Any, y: Any) -> Any:
    """Return x + y, lane by lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.fadd(*args)

    return vector(vector, vector), emit


@intrinsic
def vector_max(typingctx: Any, x: Any, y: Any) -> Any:
    """Return the larger of x and y, lane by lane; y where one is NaN."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _larger(b, *args)

    return vector(vector, vector), emit


def _larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _folded(b: Any, value: Any, operation: Any) -> Any:
    """Fold the upper half of a vector's lanes onto the lower half until one lane is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes))))
            for first in (0, lanes)
        )
        value = operation(low, high)
    return b.extract_element(value, constant(I32, 0))


@intrinsic
def lane_sum(typingctx: Any, x: Any) -> Any:
    """Return the sum of a vector's lanes."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _folded(b, args[0], b.fadd)

    return types.float32(vector), emit


@intrinsic
def lane_max(typingctx: Any, x: Any) -> Any:
    """Return the largest of a vector's lanes."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _folded(b, args[0], lambda low, high: _larger(b, low, high))

    return types.float32(vector), emit


def _element(kind: Any, numba_kind: Any) -> tuple[Any, Any]:
    """Return intrinsics that read and write element `i` of an array at an address."""

    @intrinsic
    def get(typingctx: Any, address: Any, i: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.load(b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]]))

        return numba_kind(types.int64, types.int64), emit

    @intrinsic
    def put(typingctx: Any, address: Any, i: Any, value: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            b.store(args[2], b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_kind), emit

    return get, put


get_float, put_float = _element(F32, types.float32)
get_word, put_word = _element(I64, types.int64)
get_int32, put_int32 = _element(I32, types.int32)
get_uint16, put_uint16 = _element(I16, types.uint16)
get_uint8, put_uint8 = _element(I8, types.uint8)


@intrinsic
def bits_of(typingctx: Any, x: Any) -> Any:
    """Return a float32's bits as an int32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], I32)

    return types.int32(types.float32), emit


@intrinsic
def from_bits(typingctx: Any, x: Any) -> Any:
    """Return the float32 with these bits (int32)."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], F32)

    return types.float32(types.int32), emit


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z with one rounding, in float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return multiply_add(b, *args)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def count_up(typingctx: Any, address: Any) -> Any:
    """Return the word at an address and add 1 to it, atomically; what other threads wrote before is seen after it."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), constant(I64, 1), "acq_rel")

    return types.int64(types.int64), emit


@intrinsic
def current(typingctx: Any, address: Any) -> Any:
    """Return the word at an address, which other threads change."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread run, if one is waiting for the core."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_counter(typingctx: Any, address: Any) -> Any:
    """Call the C function `int f(void)` at an address."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.sext(b.call(b.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), []), I64)

    return types.int64(types.int64), emit
