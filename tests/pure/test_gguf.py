"""GGUF files are read as the `gguf` package reads them, and their blocks keep every value."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
from tiny_gguf import Kind

from shared.errors import ModelError
from shared.kernels.formats import BLOCK, Blocks
from shared.kernels.gguf_blocks import blocks_of
from shared.models.gguf_file import GgufFile, is_gguf


def values(blocks: Blocks) -> np.ndarray:
    """The matrix, as the formats' description has it."""
    floats = blocks.quanta.astype(np.float32) * np.repeat(blocks.scales.astype(np.float32), BLOCK, axis=1)
    if blocks.minima is not None:
        floats += np.repeat(blocks.minima.astype(np.float32), BLOCK, axis=1)
    return floats


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_blocks_have_the_bits_of_the_dequantized_matrix(kind: Kind) -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(0, random.uniform(0.01, 30, (40, 1)), (40, 96)).astype(np.float32)
    data = gguf.quantize(matrix, kind)
    blocks = blocks_of(kind.name, data)
    assert (blocks.quanta.shape, blocks.scales.shape) == ((40, 96), (40, 3))
    assert (blocks.minima is None) == (kind is Kind.Q8_0)
    assert np.array_equal(values(blocks), gguf.dequantize(data, kind))
    assert not np.array_equal(values(blocks), matrix)


def test_a_file_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")} == (
        ours.fields
    )
    assert len(ours.tensors) == len(theirs.tensors) == 20
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert (own.type.name, own.shape) == (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())))
        assert np.array_equal(own.data, tensor.data.view(np.uint8))
        assert np.array_equal(own.values(), gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q5_0])
def test_other_types_are_read_too(tmp_path: Path, kind: Kind) -> None:
    weights = tiny_gguf.tensors()
    path = tiny_gguf.write(tmp_path / "model.gguf", weights, lambda name: Kind.F32 if "norm" in name else kind)
    for name, tensor in GgufFile(path).tensors.items():
        assert tensor.shape == weights[name].shape
        assert tensor.type.name == ("F32" if "norm" in name else kind.name)
        assert np.abs(tensor.values() - weights[name]).max() < (0.06 if kind is Kind.Q5_0 else 0.005)


def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = tiny_gguf.write(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 10, 24, 100, 2000, 5000, len(content) // 2, len(content) - 40):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf can't be read as GGUF"):
            GgufFile(cut)


def test_lengths_in_a_header_are_not_trusted(tmp_path: Path) -> None:
    content = bytearray(tiny_gguf.write(tmp_path / "model.gguf").read_bytes())
    for position in range(4, 400):
        changed = content.copy()
        changed[position : position + 8] = b"\xff" * 8
        (tmp_path / "changed.gguf").write_bytes(changed)
        try:
            GgufFile(tmp_path / "changed.gguf")
        except ModelError:
            continue
    (tmp_path / "changed.gguf").write_bytes(content[:4] + b"\x09" + content[5:])
    with pytest.raises(ModelError, match="version"):
        GgufFile(tmp_path / "changed.gguf")


def test_a_gguf_file_is_recognized_by_its_name_or_its_beginning(tmp_path: Path) -> None:
    named, begun, other = tmp_path / "a.gguf", tmp_path / "blob", tmp_path / "other"
    named.write_bytes(b"")
    begun.write_bytes(b"GGUF...")
    other.write_bytes(b"{}")
    assert [is_gguf(path) for path in (named, begun, other, tmp_path, tmp_path / "none.gguf")] == [
        True,
        True,
        False,
        False,
        False,
    ]
