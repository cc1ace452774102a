"""safetensors files: their tensors as NumPy arrays, memory-mapped, bfloat16 included. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shared.errors import ModelError

_TYPES: Final = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
"""NumPy types by safetensors' names. bfloat16, which NumPy lacks, is read as its bits."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor in its file."""

    type: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """The tensors of one file by name. Each is mapped on its own, so the pages that were read leave memory with it."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if the file is missing or broken."""
        self.path = path
        try:
            with safe_open(path, framework="np"):  # checks the header against the file
                pass
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        self._places = {
            name: _Place(entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._places[name].shape

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor: bits of bfloat16 as uint16, other types as they are. What is written to it stays private.

        Raises ModelError if its type is none of those that hold weights or ids.
        """
        place = self._places[name]
        if place.type not in _TYPES:
            raise ModelError(f"{self.path}: the tensor {name} has type {place.type}, and must have {', '.join(_TYPES)}")
        if 0 in place.shape:  # nothing to map
            return np.empty(place.shape, _TYPES[place.type])
        return np.asarray(np.memmap(self.path, _TYPES[place.type], "c", place.offset, place.shape))
