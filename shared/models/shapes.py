"""Checks of the tensors' shapes against a model's description."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import ModelError
from shared.models.description import LayerDescription, Linear, ModelDescription, Norm, OutOfRange, WeightName

Shape = tuple[int, ...]


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Raise ModelError, with the folder, for a model that no pass can compute; let NotDescribed through."""
    try:
        yield
    except OutOfRange as error:
        raise ModelError(f"{folder}: {error}. Correct config.json, or download the model again.") from error
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def check_shapes(model: ModelDescription, shape_of: Callable[[str], Shape]) -> None:
    """Raise ModelError for the first tensor without the shape that the description demands.

    shape_of: returns the shape of a tensor by name.
    """
    expected: dict[str, Shape] = {}
    for weight, (rows, *columns) in _expected(model, shape_of):
        before, *_ = expected.get(weight.name, (0,))
        expected[weight.name] = max(before, weight.first_row + rows), *columns
    for name, shape in expected.items():
        if 0 in shape:
            raise ModelError(f"the tensor {name} is {_words(shape)}, which leaves nothing to compute with")
        if (found := shape_of(name)) != shape:
            raise ModelError(
                f"the tensor {name} is {_words(found)}, and must be {_words(shape)} by config.json and the other "
                "tensors: the files are not of one model. Download it again."
            )


def _expected(model: ModelDescription, shape_of: Callable[[str], Shape]) -> Iterator[tuple[WeightName, Shape]]:
    yield model.embedding, (model.vocab_size, model.hidden_size)
    yield from _linear(model.head, model.vocab_size, model.hidden_size)
    yield from _norm(model.norm, model.hidden_size)
    for layer in model.layers:
        yield from _layer(layer, model.hidden_size, shape_of)


def _layer(
    layer: LayerDescription, hidden: int, shape_of: Callable[[str], Shape]
) -> Iterator[tuple[WeightName, Shape]]:
    attention, mlp = layer.attention, layer.mlp
    for norm in (layer.attention_norm, layer.mlp_norm, layer.attention_post_norm, layer.mlp_post_norm):
        yield from _norm(norm, hidden)
    q, kv = attention.heads * attention.head_size, attention.kv_heads * attention.head_size
    yield from _linear(attention.q, q, hidden)
    yield from _linear(attention.k, kv, hidden)
    yield from _linear(attention.v, kv, hidden)
    yield from _linear(attention.out, hidden, q)
    yield from _norm(attention.q_norm, q if attention.norms_whole_row else attention.head_size)
    yield from _norm(attention.k_norm, kv if attention.norms_whole_row else attention.head_size)
    width, *_ = (mlp.gate.weight.rows,) if mlp.gate.weight.rows else (*shape_of(mlp.gate.weight.name), 0)
    yield from _linear(mlp.gate, width, hidden)
    yield from _linear(mlp.up, width, hidden)
    yield from _linear(mlp.down, hidden, width)


def _linear(linear: Linear, outputs: int, inputs: int) -> Iterator[tuple[WeightName, Shape]]:
    yield linear.weight, (outputs, inputs)
    if linear.bias is not None:
        yield linear.bias, (outputs,)


def _norm(norm: Norm | None, size: int) -> Iterator[tuple[WeightName, Shape]]:
    if norm is not None:
        yield norm.gain, (size,)


def _words(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single number"
