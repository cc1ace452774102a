"""Conversion of a model in GGUF to a model folder: Hugging Face's configuration files, dense bfloat16 safetensors,
and the GGUF file itself, whose blocks can be computed with as they are. torch is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError
from shared.models.bfloat16 import nearest_bits
from shared.models.folder import GGUF
from shared.models.gguf_config import config_of, special_ids
from shared.models.gguf_file import GgufFile
from shared.models.gguf_tensors import ModelTensor, model_tensors
from shared.models.gguf_tokenizer import tokenizer_config_of, tokenizer_of

OnProgress = Callable[[str, float], None]
"""Called with a name of the current activity and its completed share, 0 to 1."""


_VALUES = 1 << 22
"""Values that are converted at a time."""


def convert_gguf(source: Path, folder: Path, progress: OnProgress) -> None:
    """Write weights, configuration and tokenizer of the GGUF file `source` into the existing `folder`.

    Raises ModelError if the file's model or tokenizer is of a kind that is not known here.
    """
    progress(f"reading {source.name}", 0.0)
    file = GgufFile(source)
    if (parts := file.whole("split.count", 0, least=0)) > 1:
        raise ModelError(f"{source} is one of {parts} parts; join them with llama.cpp's gguf-split")
    tensors = model_tensors(file)
    tied = "lm_head.weight" not in tensors
    _write_json(folder / "config.json", config_of(file, tied))
    _write_json(folder / "generation_config.json", special_ids(file))
    _write_json(folder / "tokenizer.json", tokenizer_of(file))
    _write_json(folder / "tokenizer_config.json", tokenizer_config_of(file))
    _write_weights(folder / "model.safetensors", tensors, progress)
    _link_or_copy(file.path, folder / GGUF)


def _write_weights(path: Path, tensors: Mapping[str, ModelTensor], progress: OnProgress) -> None:
    def converted() -> Iterator[NDArray[np.uint16]]:
        for done, (name, tensor) in enumerate(tensors.items()):
            progress("converting weights", done / len(tensors))
            for part in _parts(tensor):
                yield _bfloat16(name, part.values())

    _write_safetensors(path, {name: tensor.tensor.shape for name, tensor in tensors.items()}, converted())
    progress("converting weights", 1.0)


def _parts(tensor: ModelTensor) -> Iterator[ModelTensor]:
    """Split a tensor by rows, so that the embedding's values in float32 do not take several times the model."""
    rows, *inputs = tensor.tensor.shape
    at_once = max(1, _VALUES // prod(inputs))
    for first in range(0, rows, at_once):
        yield tensor.part(first, min(at_once, rows - first))


def write_bfloat16(path: Path, tensors: Mapping[str, NDArray[np.uint16]]) -> None:
    """Write bfloat16 tensors, given as their bits, as safetensors."""
    _write_safetensors(path, {name: bits.shape for name, bits in tensors.items()}, iter(tensors.values()))


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], bits: Iterator[NDArray[np.uint16]]) -> None:
    """Write bfloat16 tensors one after the other: header length, JSON header, data.

    NumPy has no bfloat16, so `safetensors.numpy` can't write it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for each in bits:
            file.write(np.ascontiguousarray(each, dtype="<u2").tobytes())


def _link_or_copy(source: Path, target: Path) -> None:
    """Give the file a second name; copy it where that is impossible, as on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _bfloat16(name: str, weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return a tensor's values as bits of bfloat16. Raises ModelError for values that are not finite."""
    if not np.isfinite(weight).all():
        raise ModelError(
            f"The tensor {name} holds values that are not finite. Download the file, or install its package, again."
        )
    return nearest_bits(weight)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
