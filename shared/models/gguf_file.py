"""GGUF files: metadata, and tensors as they lie in the file, memory-mapped.

The `gguf` package expands blocks and has the sizes of types that `TYPES` lacks. Its reader is not used: it takes
seconds for a vocabulary.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.models.bfloat16 import to_floats
from shared.models.weight_files import refuse_pointer

MAGIC: Final = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata types by number, in the notation of `struct`."""
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_DEEPEST = 8
"""Most arrays within each other; the format sets no limit, and no writer nests more than two."""
_MOST_SIZES = 4
"""Most sizes of a tensor's shape (ggml's GGML_MAX_DIMS)."""


_ANOTHER_FILE = "Download the file again, or give the model's Hugging Face folder instead."


@dataclass(frozen=True, slots=True)
class TensorType:
    """Layout of a tensor's values."""

    name: str
    values: int
    """Values of a block."""
    size: int
    """Bytes of a block."""


TYPES: Final = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    8: TensorType("Q8_0", 32, 34),
    30: TensorType("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor with its bytes."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    """(outputs, inputs) of a matrix."""
    data: NDArray[np.uint8] = field(repr=False)
    """The bytes, (outputs, bytes of a row), or (bytes,) of a vector."""

    def values(self) -> NDArray[np.float32]:
        """Return the values, as float32. Raises ModelError for a type that cannot be expanded."""
        if self.type.name == "F32":
            return self.data.view("<f4").astype(np.float32, copy=False)
        if self.type.name == "F16":
            return self.data.view("<f2").astype(np.float32)
        if self.type.name == "BF16":
            return to_floats(self.data.view("<u2"))
        import gguf

        try:
            values: NDArray[np.float32] = gguf.dequantize(self.data, gguf.GGMLQuantizationType[self.type.name])
        except NotImplementedError:
            raise ModelError(
                f"the GGUF tensor {self.name} is of type {self.type.name}, which cannot be expanded. Give a file of "
                f"other types ({', '.join(kind.name for kind in TYPES.values())}), or the model's Hugging Face folder."
            ) from None
        return values.astype(np.float32, copy=False)


class GgufFile:
    """An open GGUF file. Raises ModelError if it cannot be read or is cut short.

    The getters check a value of the metadata. They raise ModelError for a value of another type, and for a key that is
    absent, unless a default is given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            refuse_pointer(path, self._bytes[:100].tobytes())
            reader = _HeaderReader(self._bytes.data)
            self.fields, infos = reader.header()
            alignment = self.fields.get("general.alignment", _DEFAULT_ALIGNMENT)
            if not _is_whole(alignment) or alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"its general.alignment is {_shown(alignment)}, not a power of two")
            start = -(-reader.position // alignment) * alignment
            self.tensors = {info.name: self._tensor(info, start) for info in infos}
            if len(self.tensors) < len(infos):
                raise ValueError("two tensors have the same name")
            # A small file could name the same bytes again and again, and be converted to a large one.
            if sum(tensor.data.nbytes for tensor in self.tensors.values()) > len(self._bytes):
                raise ValueError("its tensors overlap")
        except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
            raise ModelError(
                f"{path} can't be read as GGUF ({error}). Download the file, or install its package, again."
            ) from error

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return an integer of at least `least`."""
        value = self._value(key, default)
        if not _is_whole(value) or value < least:
            raise self._unusable(key, f"an integer from {least}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above zero."""
        value = self._value(key, default)
        if not (_is_whole(value) or isinstance(value, float)) or not 0 < value < math.inf:
            raise self._unusable(key, "a positive number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._unusable(key, "a string")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._unusable(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._unusable(key, "an array of strings")
        return value

    def wholes(self, key: str) -> list[int]:
        """Return an array of integers."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(map(_is_whole, value)):
            raise self._unusable(key, "an array of integers")
        return value

    def numbers(self, key: str) -> list[float]:
        """Return an array of finite numbers."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(_is_finite(each) for each in value):
            raise self._unusable(key, "an array of numbers")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no metadata {key}, which a model of its kind needs. {_ANOTHER_FILE}")
        return value

    def _unusable(self, key: str, expected: str) -> ModelError:
        shown = _shown(self.fields.get(key))
        return ModelError(f"{self.path}: the metadata {key} is {shown}, not {expected}. {_ANOTHER_FILE}")

    def _tensor(self, info: _TensorInfo, start: int) -> GgufTensor:
        """start: of the tensors' data."""
        name, shape, kind = info.name, info.shape, TYPES.get(info.type) or _other_type(info.name, info.type)
        if not shape or 0 in shape or shape[-1] % kind.values:
            raise ValueError(f"the tensor {name} of {kind.name} has the shape {shape}")
        begin, size = start + info.offset, prod(shape) // kind.values * kind.size
        if begin + size > len(self._bytes):
            raise ValueError(f"the file ends before the tensor {name} does")
        row = shape[-1] // kind.values * kind.size
        return GgufTensor(name, kind, shape, self._bytes[begin : begin + size].reshape(*shape[:-1], row))


def is_gguf(path: Path) -> bool:
    """Return whether this is a file that begins like GGUF, or is named so."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _other_type(tensor: str, number: int) -> TensorType:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        return TensorType(kind.name, *gguf.GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError):
        raise ValueError(f"the tensor {tensor} has the unknown type {number}") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """A tensor as the header has it."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    """Distance from the start of the tensors' data."""


class _HeaderReader:
    """Reads the part of a file before the tensors' data: little-endian numbers, strings with their length before."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0

    def header(self) -> tuple[dict[str, Any], list[_TensorInfo]]:
        """Return the metadata and the tensors."""
        if self._take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with the letters GGUF")
        if (version := self._number("I")) not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise ValueError("its numbers are big-endian; only little-endian ones are read")
            raise ValueError(f"its version is {version}; 2 and 3 are known")
        tensors, fields = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            if (key := self._string()) in metadata:
                raise ValueError(f"it has the metadata {key} twice")
            metadata[key] = self._value(key, self._number("I"))
        return metadata, [self._tensor() for _ in range(tensors)]

    def _tensor(self) -> _TensorInfo:
        name = self._string()
        if (count := self._number("I")) > _MOST_SIZES:
            raise ValueError(f"the tensor {name} has {count} sizes; at most {_MOST_SIZES} are known")
        sizes = [self._number("Q") for _ in range(count)]
        return _TensorInfo(name, tuple(reversed(sizes)), self._number("I"), self._number("Q"))

    def _value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"the metadata {key} has the unknown type {kind}")
        if depth == _DEEPEST:
            raise ValueError(f"the metadata {key} has more than {_DEEPEST} arrays within each other")
        element, count = self._number("I"), self._number("Q")
        if element in _SCALARS:
            code = f"<{_SCALARS[element]}"
            return [value for (value,) in struct.iter_unpack(code, self._take(count * struct.calcsize(code)))]
        return [self._value(key, element, depth + 1) for _ in range(count)]

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return value

    def _string(self) -> str:
        return str(self._take(self._number("Q")), "utf-8")

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise ValueError("the file ends in its header")
        taken = bytes(self._data[self.position : end])
        self.position = end
        return taken
