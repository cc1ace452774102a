"""A GGUF file as the target: its folder, and logits from its blocks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import HEAD, HEADS, KV_HEADS, Kind

from shared.engine import Engine, Step
from shared.errors import EngineError, ModelError
from shared.kernels.cache import PackedBatch
from shared.kernels.decoder import Decoder
from shared.kernels.weights import Floats
from shared.models.description import WeightName
from shared.models.families import describe
from shared.models.folder import ModelFolder
from shared.models.gguf_file import GgufFile
from shared.models.gguf_tensors import model_tensors
from shared.models.prepare import prepare

TOKENS = [7 * i % tiny_gguf.VOCAB for i in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf")
    return prepare(tiny_gguf.write(path / "some-model.Q4.gguf"), path / "models")


def logits(folder: Path, dtype: str) -> torch.Tensor:
    engine = Engine(folder, dtype=dtype, budget_tokens=512)
    engine.attach("s", [])
    return torch.cat([engine.forward([Step("s", part, len(part))]).logits for part in (TOKENS[:90], TOKENS[90:])])


def of_float32(folder: Path) -> Floats:
    """Logits of the dequantized weights in float32, with keys and values as the engine has them."""
    tensors = model_tensors(GgufFile(folder / "model.gguf"))
    model = describe(json.loads((folder / "config.json").read_text()), tensors)

    def read(name: WeightName) -> Floats:
        return np.ascontiguousarray(tensors[name.name].values())

    decoder = Decoder.of(model, read, form="float32", kv_form="bfloat16", blocks=4, threads=1)
    parts = []
    for start, stop in ((0, 90), (90, 100)):
        batch = PackedBatch([[0, 1]], [start], [stop - start])
        parts.append(decoder.forward(batch, tokens=TOKENS[start:stop], wanted=range(stop - start))[1])
    return np.concatenate(parts)


def test_blocks_give_the_bits_of_the_dequantized_weights(folder: Path) -> None:
    from_blocks = logits(folder, "gguf").numpy()
    assert np.array_equal(from_blocks, of_float32(folder))
    assert not np.array_equal(from_blocks, logits(folder, "bfloat16").numpy())


def test_every_format_computes_nearly_the_same(folder: Path) -> None:
    expected = logits(folder, "float32")
    for dtype in ("bfloat16", "int8", "gguf"):
        found = logits(folder, dtype)
        assert (found - expected).std() < 0.05 * expected.std()


def test_types_without_blocks_are_expanded(tmp_path: Path) -> None:
    kinds = {"ffn_down": Kind.F16, "attn_q": Kind.BF16, "attn_output": Kind.Q5_0}

    def kind(name: str) -> Kind:
        return kinds.get(name.rpartition(".")[0].rpartition(".")[2]) or tiny_gguf.mixed(name)

    folder = prepare(tiny_gguf.write(tmp_path / "other.gguf", kind=kind), tmp_path / "models")
    found, expected = logits(folder, "gguf").numpy(), of_float32(folder)
    assert np.abs(found - expected).max() < 0.05 * expected.std()


def test_a_vector_in_blocks_is_expanded(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "norms.gguf", kind=lambda name: Kind.Q8_0)
    folder = prepare(path, tmp_path / "models")
    found, expected = logits(folder, "gguf").numpy(), of_float32(folder)
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


def test_the_folder_is_named_after_the_file_and_holds_bfloat16_weights(folder: Path) -> None:
    assert folder.name == "some-model.Q4"
    tensors = load_file(folder / "model.safetensors")
    file = GgufFile(folder / "model.gguf")
    assert len(tensors) == len(file.tensors)
    up = torch.from_numpy(file.tensors["blk.1.ffn_up.weight"].values()).to(torch.bfloat16)
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], up)
    # llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + 8.
    for ours, theirs, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        source = torch.from_numpy(file.tensors[f"blk.1.{theirs}.weight"].values()).to(torch.bfloat16)
        rows = [HEAD * head + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(HEAD // 2)]
        assert torch.equal(tensors[f"model.layers.1.self_attn.{ours}.weight"], source[rows])


def test_a_prepared_file_is_used_again_until_it_changes(tmp_path: Path) -> None:
    file, models, doings = tmp_path / "model.gguf", tmp_path / "models", list[str]()

    def fingerprint(**options: int) -> str:
        doings.clear()
        folder = prepare(file, models, lambda doing, share: doings.append(doing))
        return ModelFolder(folder).fingerprint("gguf")

    tiny_gguf.write(file)
    first = fingerprint()
    assert "converting weights" in doings
    assert fingerprint() == first
    assert doings == []
    file.unlink()  # a download replaces a file, it does not write into it
    tiny_gguf.write(file, tiny_gguf.tensors(seed=1))
    assert fingerprint() != first
    assert "converting weights" in doings


def test_formats_have_fingerprints_of_their_own(folder: Path, tmp_path: Path) -> None:
    model = ModelFolder(folder)
    assert model.dtypes == ("bfloat16", "float32", "int8", "gguf")
    assert len({model.fingerprint(dtype) for dtype in model.dtypes}) == 4
    model.describe(tmp_path / "described")
    described = ModelFolder(tmp_path / "described")
    assert described.dtypes == model.dtypes
    assert described.fingerprint("gguf") == model.fingerprint("gguf")


def test_a_folder_of_an_earlier_version_is_converted_again(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "model.gguf")
    folder = prepare(file, tmp_path / "models")
    marker = folder / "wisp-model.json"
    written = json.loads(marker.read_text())
    marker.write_text(json.dumps(written | {"format": 1}))
    (folder / "generation_config.json").write_text("{}")
    assert prepare(file, tmp_path / "models") == folder
    assert json.loads(marker.read_text()) == written
    assert ModelFolder(folder).eos_ids


def test_only_a_folder_from_gguf_has_that_format(tmp_path: Path) -> None:
    folder = tiny.target(tmp_path)
    assert folder.dtypes == ("bfloat16", "float32", "int8")
    for use in (lambda: folder.fingerprint("gguf"), lambda: Engine(folder.path, dtype="gguf")):
        with pytest.raises(ModelError, match=r"has no GGUF file.*or another dtype"):
            use()


def test_a_file_without_blocks_is_no_reason_for_that_format(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "wide.gguf", kind=lambda name: Kind.F32)
    folder = prepare(file, tmp_path / "models")
    with pytest.raises(ModelError, match=r"has no tensor in blocks of Q4_0, Q4_1, Q8_0 \(its types: F32\)"):
        Engine(folder, dtype="gguf")
    assert torch.isfinite(logits(folder, "int8")).all()
    assert ModelFolder(folder).resolved("auto") == "bfloat16"


def test_auto_keeps_the_blocks_of_a_file(folder: Path, tmp_path: Path) -> None:
    model = ModelFolder(folder)
    assert model.resolved("auto") == "gguf"
    assert model.fingerprint("auto") == model.fingerprint("gguf")
    model.describe(tmp_path / "described")
    assert ModelFolder(tmp_path / "described").fingerprint("auto") == model.fingerprint("gguf")
    assert model.resolved("float32") == "float32"
    assert tiny.target(tmp_path).resolved("auto") == "bfloat16"


def test_a_folder_that_is_not_from_a_file_is_left_alone(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "mine.gguf")
    other = tiny.make(tmp_path / "models" / "mine")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in other.iterdir())
    with pytest.raises(ModelError, match=r"is another model\. Rename the file"):
        prepare(file, tmp_path / "models")
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in other.iterdir())
    os.rename(file, tmp_path / "smollm2-135m-instruct.gguf")
    with pytest.raises(ModelError, match=r"is another model\. Rename the file"):
        prepare(tmp_path / "smollm2-135m-instruct.gguf", tmp_path / "models")


def test_an_error_names_the_part_that_cannot_be_converted(tmp_path: Path) -> None:
    models = tmp_path / "models"
    other = tiny_gguf.write(tmp_path / "other.gguf", architecture="glm4")
    with pytest.raises(ModelError, match="holds a glm4 model"):
        prepare(other, models)
    scaled = tiny_gguf.write(tmp_path / "scaled.gguf", **{"rope.scaling.type": "longrope"})
    with pytest.raises(ModelError, match="position embedding is scaled"):
        prepare(scaled, models)
    extra = tiny_gguf.tensors() | {"rope_factors_long.weight": np.ones(8, np.float32)}
    with pytest.raises(ModelError, match=r"'rope_factors_long\.weight' has no place"):
        prepare(tiny_gguf.write(tmp_path / "extra.gguf", extra, lambda name: Kind.F32), models)
    assert [path for path in models.iterdir() if path.is_dir()] == []


def test_weights_of_another_shape_are_refused_at_load(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = _changed(folder, tmp_path, name, torch.zeros(64, 64))
    for dtype in ("bfloat16", "int8"):
        with pytest.raises(ModelError, match=f"{tmp_path}.*the tensor {name} is 64 x 64, and must be 64 x 96"):
            Engine(path, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_not_taken_for_plain_ones(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = _changed(folder, tmp_path, name, torch.ones(64, 96).to(dtype))
    with pytest.raises(ModelError, match=rf"the tensor {name} .* is of quantized weights"):
        Engine(path)


def test_scales_beside_weights_are_not_ignored(folder: Path, tmp_path: Path) -> None:
    path = _changed(folder, tmp_path, "model.layers.0.mlp.down_proj.weight_scale", torch.ones(1))
    with pytest.raises(ModelError, match=r"weight_scale .* is of quantized weights"):
        Engine(path)


def test_int8_needs_a_described_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="int8 weights need the compiled pass"):
        Engine(tiny.make(tmp_path, tiny.GPT_NEOX), dtype="int8")


def _changed(folder: Path, path: Path, name: str, tensor: torch.Tensor) -> Path:
    """A folder with one tensor more, or another one."""
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, path / "model.safetensors")
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return path
