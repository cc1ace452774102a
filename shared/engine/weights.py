"""Weights of a model folder, read as the kernels pack them: from safetensors, or in the blocks of a GGUF file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from shared.errors import ModelError
from shared.kernels.gguf_blocks import BLOCK_BYTES, blocks_of
from shared.kernels.weights import Matrix
from shared.models.description import ModelDescription, WeightName, weight_names
from shared.models.families import describe
from shared.models.folder import GGUF, no_gguf_file
from shared.models.gguf_file import GgufFile
from shared.models.gguf_tensors import ModelTensor, model_tensors
from shared.models.shapes import check_shapes, refusals
from shared.models.weight_files import FLOATS, UNQUANTIZED, read_config, refuse_quantized, stored_tensors


class Weights(Protocol):
    """The tensors of a model."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors, as transformers has them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def refuse_quantized(self, config: Mapping[str, Any]) -> None:
        """Raise ModelError if the tensors are those of a quantized model, or of an adapter, in safetensors."""

    def check(self, names: Collection[str]) -> None:
        """Raise ModelError if one of these tensors has a type that does not hold weights."""

    def read(self, weight: WeightName) -> Matrix:
        """Return a weight: float32, bits of bfloat16 (uint16), or blocks."""


@contextmanager
def opened(folder: Path, form: str) -> Iterator[Weights]:
    """Open the weights for this format (of `folder.DTYPES`) while the context lasts. Raises ModelError."""
    if form == "gguf":
        yield GgufWeights(folder)
        return
    with ExitStack() as stack:
        yield SafetensorsWeights(folder, stack)


@contextmanager
def described(folder: Path, form: str) -> Iterator[tuple[ModelDescription, Weights]]:
    """Open the weights of a model that a description covers, checked against it. Raises NotDescribed and ModelError."""
    config = read_config(folder)
    with opened(folder, form) as weights:
        weights.refuse_quantized(config)
        with refusals(folder):
            model = describe(config, weights.names)
            weights.check({weight.name for weight in weight_names(model)})
            check_shapes(model, weights.shape)
            yield model, weights


class SafetensorsWeights:
    """Tensors of safetensors files."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """stack: closes the files."""
        self._folder = folder
        self.tensors = stored_tensors(folder)
        try:
            self._files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in {tensor.file for tensor in self.tensors.values()}
            }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder} cannot be read ({error}); download the model again") from error

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def refuse_quantized(self, config: Mapping[str, Any]) -> None:
        refuse_quantized(self._folder, config, self.tensors)

    def check(self, names: Collection[str]) -> None:
        for name in names:
            if (kind := self.tensors[name].type) not in FLOATS:
                raise ModelError(f"the tensor {name} is of {kind}, which holds no plain weights. {UNQUANTIZED}")

    def read(self, weight: WeightName) -> Matrix:
        tensor = self._files[self.tensors[weight.name].file].get_tensor(weight.name)
        if weight.rows is not None:
            tensor = tensor[weight.first_row : weight.first_row + weight.rows]
        return as_matrix(tensor)


class GgufWeights:
    """Tensors of a GGUF file. Those in blocks that the kernels do not have are expanded to float32."""

    def __init__(self, folder: Path) -> None:
        if not (folder / GGUF).is_file():
            raise no_gguf_file(folder)
        file = GgufFile(folder / GGUF)
        self._tensors = model_tensors(file)
        if not any(tensor.tensor.type.name in BLOCK_BYTES for tensor in self._tensors.values()):
            kinds = sorted({tensor.tensor.type.name for tensor in self._tensors.values()})
            raise ModelError(
                f"{file.path} has no tensor in blocks of {', '.join(BLOCK_BYTES)} (its types: {', '.join(kinds)}), so "
                "the dtype gguf keeps nothing of it. Choose bfloat16, float32 or int8."
            )

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].tensor.shape

    def refuse_quantized(self, config: Mapping[str, Any]) -> None:
        """Its blocks are what the format is for."""

    def check(self, names: Collection[str]) -> None:
        """Every type of GGUF holds weights."""

    def read(self, weight: WeightName) -> Matrix:
        tensor = self._tensors[weight.name]
        return _matrix(tensor if weight.rows is None else tensor.part(weight.first_row, weight.rows))


def _matrix(tensor: ModelTensor) -> Matrix:
    kind = tensor.tensor.type.name
    if kind in BLOCK_BYTES and len(tensor.tensor.shape) == 2:
        return blocks_of(kind, tensor.data())
    if kind == "BF16" and len(tensor.tensor.shape) == 2:
        return tensor.data().view("<u2")
    return tensor.values()


def as_matrix(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's bits of bfloat16 (uint16), or its values as float32."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.float().contiguous().numpy()
