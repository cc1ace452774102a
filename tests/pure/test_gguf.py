"""GGUF files are read as the `gguf` package reads them, and their blocks keep every value."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
from tiny_gguf import Kind

from shared.errors import ModelError
from shared.kernels.formats import SCALE_BLOCK, Blocks
from shared.kernels.gguf_blocks import blocks_of
from shared.models.convert import convert_gguf
from shared.models.gguf_file import GgufFile, is_gguf
from shared.models.prepare import prepare


def values(blocks: Blocks) -> np.ndarray:
    """The matrix, as the formats' description has it."""
    floats = blocks.quanta.astype(np.float32) * np.repeat(blocks.scales.astype(np.float32), SCALE_BLOCK, axis=1)
    if blocks.minima is not None:
        floats += np.repeat(blocks.minima.astype(np.float32), SCALE_BLOCK, axis=1)
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
    (tmp_path / "changed.gguf").write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    with pytest.raises(ModelError, match="its numbers are big-endian"):
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


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def alignment(kind: int, value: bytes) -> bytes:
    return string("general.alignment") + struct.pack("<I", kind) + value


NESTED = string("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
TENSOR = string("t") + struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("fields", "tensors", "reason"),
    [
        ([alignment(4, struct.pack("<I", 0))], [], "its general.alignment is 0, not a power of two"),
        ([alignment(4, struct.pack("<I", 24))], [], "its general.alignment is 24"),
        ([alignment(6, struct.pack("<f", 32.0))], [], "its general.alignment is 32.0"),
        ([alignment(7, b"\1")], [], "its general.alignment is True"),
        ([alignment(8, string("32"))], [], "its general.alignment is '32'"),
        ([alignment(4, struct.pack("<I", 32))] * 2, [], "it has the metadata general.alignment twice"),
        ([NESTED], [], "the metadata deep has more than 8 arrays within each other"),
        ([string("odd") + struct.pack("<I", 77)], [], "the metadata odd has the unknown type 77"),
        ([], [TENSOR + struct.pack("<QIQ", 8, 99, 0)], "the tensor t has the unknown type 99"),
        ([], [TENSOR + struct.pack("<QIQ", 0, 0, 0)], "the tensor t of F32 has the shape"),
        ([], [TENSOR + struct.pack("<QIQ", 33, 8, 0)], "the tensor t of Q8_0 has the shape"),
        ([], [TENSOR + struct.pack("<QIQ", 8, 0, 0)] * 2, "two tensors have the same name"),
        ([], [string("t") + struct.pack("<I5QIQ", 5, 1, 1, 1, 1, 1, 0, 0)], "the tensor t has 5 sizes"),
        ([], [TENSOR + struct.pack("<QIQ", 1 << 62, 0, 0)], "the file ends before the tensor t does"),
        ([], [string(name) + struct.pack("<IQIQ", 1, 1000, 0, 0) for name in "tu"], "its tensors overlap"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    tmp_path: Path, fields: list[bytes], tensors: list[bytes], reason: str
) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields + tensors)
    (tmp_path / "odd.gguf").write_bytes(header + bytes(4096))
    with pytest.raises(ModelError, match=rf"odd\.gguf can't be read as GGUF \({reason}"):
        GgufFile(tmp_path / "odd.gguf")


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="is a pointer of git-lfs"):
        GgufFile(tmp_path / "model.gguf")


HEADS = "llama.attention.head_count"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (HEADS, None, f"has no metadata {HEADS}, which"),
        (HEADS, 0, f"the metadata {HEADS} is 0, not an integer from 1"),
        (HEADS, -4, f"the metadata {HEADS} is -4, not an integer from 1"),
        (HEADS, 4.0, f"the metadata {HEADS} is 4.0, not an integer"),
        (HEADS, "4", f"the metadata {HEADS} is '4', not an integer"),
        (HEADS, True, f"the metadata {HEADS} is True, not an integer"),
        (HEADS, 5, r"the tensor blk\.0\.attn_q\.weight of shape \(64, 64\) has no 5 heads"),
        (f"{HEADS}_kv", "2", f"the metadata {HEADS}_kv is '2', not an integer"),
        ("llama.embedding_length", None, "has no metadata llama.embedding_length"),
        ("llama.context_length", "long", "llama.context_length is 'long', not an integer"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, "layer_norm_rms_epsilon is 0.0, not a positive number"),
        ("llama.rope.freq_base", float("nan"), "llama.rope.freq_base is nan, not a positive number"),
        ("tokenizer.ggml.tokens", None, "has no metadata tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", 7, "tokenizer.ggml.tokens is 7, not an array of strings"),
        ("tokenizer.ggml.tokens", ["x"] * tiny_gguf.VOCAB, "has the token 'x' 320 times"),
        ("tokenizer.ggml.token_type", "none", "tokenizer.ggml.token_type is 'none', not an array of integers"),
        ("tokenizer.ggml.merges", 1, "tokenizer.ggml.merges is 1, not an array of strings"),
        ("tokenizer.ggml.eos_token_id", 10**6, "eos_token_id is 1000000, and the vocabulary has 320 tokens"),
        ("tokenizer.ggml.pre", 3, "tokenizer.ggml.pre is 3, not a string"),
    ],
)
def test_metadata_that_a_llama_needs_is_checked(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", changes={key: value})
    with pytest.raises(ModelError, match=rf"model\.gguf.*{reason}"):
        convert_gguf(path, tmp_path, lambda doing, share: None)


@pytest.mark.parametrize(
    ("more", "fewer", "reason"),
    [
        ({"blk.0.attn_q.bias": 64}, None, "the unknown tensor model.layers.0.self_attn.q_proj.bias"),
        ({"blk.1.attn_output.bias": 64}, None, "the unknown tensor model.layers.1.self_attn.o_proj.bias"),
        ({"output_norm.bias": 64}, None, "the unknown tensor model.norm.bias"),
        ({"blk.2.ffn_norm.weight": 64}, None, "the unknown tensor model.layers.2.post_attention_layernorm.weight"),
        ({}, "output_norm.weight", "has no tensor model.norm.weight"),
    ],
)
def test_tensors_that_no_pass_would_compute_are_refused_at_once(
    tmp_path: Path, more: dict[str, int], fewer: str | None, reason: str
) -> None:
    weights = tiny_gguf.tensors() | {name: np.ones(size, np.float32) for name, size in more.items()}
    weights.pop(fewer or "", None)
    path = tiny_gguf.write(tmp_path / "odd.gguf", weights, lambda name: Kind.F32)
    with pytest.raises(ModelError, match=rf"odd\.gguf: the folder has.*{re.escape(reason.removeprefix('has '))}"):
        prepare(path, tmp_path / "models")
    assert [each for each in (tmp_path / "models").iterdir() if each.is_dir()] == []


def test_an_error_of_a_conversion_names_the_file(tmp_path: Path) -> None:
    """The folder of a conversion that fails is removed."""
    path = tiny_gguf.write(tmp_path / "odd.gguf", changes={"llama.embedding_length": 60})
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}: the tensor model\.embed_tokens\.weight"):
        prepare(path, tmp_path / "models")
