"""Weights that would load as another model, or not at all, are refused with a sentence that says what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelError
from shared.models.weight_files import (
    INDEX,
    SINGLE,
    refuse_quantized,
    require_weight_file,
    some_names,
    stored_tensors,
    weight_files,
)

TENSORS = {"model.norm.weight": ("BF16", (4,)), "lm_head.weight": ("F32", (3, 2))}
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 270000000\n"


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], room: int = 0) -> Path:
    """Write a file of zeros. room: bytes more, or fewer, than the values need."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + BYTES[kind] * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end + room))
    return path


def sharded(folder: Path, **shards: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, tensors in shards.items():
        write(folder / f"{name}.safetensors", tensors)
    places = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_headers_are_read_from_one_file_or_from_those_of_the_index(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, TENSORS)
    found = stored_tensors(tmp_path)
    assert {name: (tensor.type, tensor.shape) for name, tensor in found.items()} == TENSORS
    sharded(tmp_path, a={"x": ("F32", (1,))}, b={"y": ("BF16", (2,))})
    write(tmp_path / "consolidated.safetensors", TENSORS)
    found = stored_tensors(tmp_path)
    assert {name: tensor.file.name for name, tensor in found.items()} == {"x": "a.safetensors", "y": "b.safetensors"}
    assert weight_files(tmp_path) == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize("missing", [1, 7])
@pytest.mark.parametrize("where", ["header", "values"])
def test_a_file_cut_short_is_refused(tmp_path: Path, where: str, missing: int) -> None:
    path = write(tmp_path / SINGLE, TENSORS)
    content = path.read_bytes()
    path.write_bytes(content[:-missing] if where == "values" else content[: 60 - missing])
    reason = "incomplete" if where == "values" else "ends in its header"
    with pytest.raises(
        ModelError, match=rf"{SINGLE} can't be read as safetensors \(.*{reason}.*Download the model again"
    ):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"12345", b"<!DOCTYPE html><html></html>", bytes(16), b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ModelError, match=r"Download the model again"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"x": 1},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": 3, "shape": [2], "data_offsets": [0, "8"]}},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any) -> None:
    encoded = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    with pytest.raises(ModelError, match="can't be read as safetensors"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a pointer of git-lfs, not the file itself\. Run `git lfs pull`"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("present", "advice"),
    [
        ("pytorch_model.bin", r"only pytorch_model\.bin: .*save_pretrained"),
        ("consolidated.00.pth", r"only consolidated\.00\.pth: .*save_pretrained"),
        ("tf_model.h5", r"only tf_model\.h5: .*save_pretrained"),
        ("some-model.Q4_0.gguf", r"only some-model\.Q4_0\.gguf: give the path of that file"),
        ("adapter_model.safetensors", r"holds a PEFT adapter and no model.*merge_and_unload"),
        ("README.md", r"lacks model\.safetensors.*download the model again in full"),
    ],
)
def test_a_folder_with_other_weights_is_refused_with_advice(tmp_path: Path, present: str, advice: str) -> None:
    (tmp_path / present).touch()
    with pytest.raises(ModelError, match=advice):
        require_weight_file(tmp_path / SINGLE)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a.safetensors"]}, "has no weight_map"),
        ({"weight_map": {"x": "../a.safetensors"}}, "which is no file of the folder"),
        ({"weight_map": {"x": 1}}, "which is no file of the folder"),
        ({"weight_map": {"x": "a.safetensors", "z": "a.safetensors"}}, "a.safetensors lacks the tensor z"),
        ({"weight_map": {"x": "a.safetensors", "y": "c.safetensors"}}, "lacks c.safetensors"),
        ([], "holds no JSON object"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, index: Any, reason: str) -> None:
    sharded(tmp_path, a={"x": ("F32", (1,))}, b={"y": ("BF16", (2,))})
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=reason):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("config", "file", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, None, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None, "bitsandbytes"),
        ({"quantization_config": {}}, None, "an unnamed method"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, None, "mxfp4"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, None, "compressed-tensors"),
        ({}, ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}), "FP8"),
        ({}, ("quantize_config.json", {"bits": 4, "quant_method": "gptq"}), "gptq"),
        ({}, ("quant_config.json", {"w_bit": 4}), "an unnamed method"),
    ],
)
def test_quantized_weights_are_refused_by_their_method(
    tmp_path: Path, config: dict[str, Any], file: tuple[str, dict[str, Any]] | None, method: str
) -> None:
    if file:
        (tmp_path / file[0]).write_text(json.dumps(file[1]))
    write(tmp_path / SINGLE, TENSORS)
    with pytest.raises(
        ModelError, match=rf"quantized by {method} \(.*which is not supported\. Take the model in bfloat16"
    ):
        refuse_quantized(tmp_path, config, stored_tensors(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("model.layers.0.mlp.down_proj.weight", "F8_E4M3", "is of quantized weights"),
        ("model.layers.0.mlp.down_proj.weight", "I8", "is of quantized weights"),
        ("model.layers.0.mlp.down_proj.weight_scale", "F32", "is of quantized weights"),
        ("model.layers.0.mlp.down_proj.qweight", "U8", "is of quantized weights"),
        ("base_model.model.model.norm.weight", "F32", "is a tensor of a PEFT adapter.*merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "F32", "is a tensor of a PEFT adapter"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "F32", "is a tensor of a PEFT adapter"),
    ],
)
def test_tensors_that_no_plain_model_has_are_refused(tmp_path: Path, name: str, kind: str, reason: str) -> None:
    write(tmp_path / SINGLE, {**TENSORS, name: (kind, (2,))})
    with pytest.raises(ModelError, match=f"{name} .*{reason}"):
        refuse_quantized(tmp_path, {}, stored_tensors(tmp_path))


def test_plain_weights_are_taken(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, TENSORS)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    refuse_quantized(tmp_path, {"quantization_config": None, "text_config": {}}, stored_tensors(tmp_path))


def test_many_names_are_shortened() -> None:
    assert some_names("cab") == "a, b, c"
    assert some_names("edcba") == "a, b, c and 2 more"
