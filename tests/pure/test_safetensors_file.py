"""safetensors files as NumPy arrays: types, shapes, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.errors import ModelError
from shared.models.bfloat16 import to_floats
from shared.models.safetensors_file import SafetensorsFile

VALUES = torch.tensor([[1.5, -2.0, 0.25], [1e30, 0.0, -3.0]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.int32),
        "bits": VALUES.to(torch.bfloat16),
        "halves": VALUES.clamp(-100, 100).half(),
        "floats": VALUES,
        "ids": torch.tensor([5, 1 << 40]),
        "none": torch.zeros(0, 3),
        "bytes": torch.zeros(2, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"of": "a test"})
    return tmp_path / "a.safetensors"


def test_each_type_is_read_as_its_values(path: Path) -> None:
    file = SafetensorsFile(path)
    assert set(file.names) == {"odd", "bits", "halves", "floats", "ids", "none", "bytes"}
    assert file.shape("bits") == (2, 3)
    assert file.read("bits").dtype == np.uint16
    assert to_floats(file.read("bits")).tolist() == VALUES.to(torch.bfloat16).tolist()
    assert file.read("halves").tolist() == VALUES.clamp(-100, 100).half().tolist()
    assert file.read("floats").tolist() == VALUES.tolist()
    assert file.read("odd").tolist() == [1, 2, 3]
    assert file.read("ids").tolist() == [5, 1 << 40]
    assert file.read("none").shape == (0, 3)


def test_writing_to_an_array_leaves_the_file_alone(path: Path) -> None:
    SafetensorsFile(path).read("floats")[:] = 7
    assert SafetensorsFile(path).read("floats").tolist() == VALUES.tolist()


def test_a_type_of_neither_weights_nor_ids_is_refused(path: Path) -> None:
    with pytest.raises(ModelError, match="bytes has type U8"):
        SafetensorsFile(path).read("bytes")


@pytest.mark.parametrize("cut", [0, 5, 20, -1])
def test_a_file_that_lacks_its_end_is_refused(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsFile(path)


def test_a_header_that_points_beyond_the_file_is_refused(path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsFile(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsFile(tmp_path / "missing.safetensors")
