"""Memory while weights are loaded and converted, each in a process of its own: never a second copy of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from import_graph import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

pytestmark = pytest.mark.slow

MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
way, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if way == "gpu":
    from shared.engine.gpu_pass import load_part
else:
    from shared.engine.compiled_pass import CompiledPass
    from shared.kernels import native
    from shared.models.convert import convert_gguf
    native.load()

def load():
    if way == "gpu":
        return load_part(folder, "bfloat16", torch.device("cpu"), 2, None)
    if way == "conversion":
        return convert_gguf(folder / "model.gguf", out, lambda doing, share: None)
    read = []
    if way == "twice":
        from safetensors.torch import load_file
        read = [{name: each.clone() for name, each in load_file(file).items()} for file in folder.glob("*.safetensors")]
    return read, CompiledPass(folder, form="gguf" if way == "gguf" else "bfloat16", threads=1, blocks=2)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, seen, ended = held(), [], threading.Event()
def watch():
    while not ended.wait(0.001):
        seen.append(held())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
loaded = load()
seen.append(held())
ended.set()
watcher.join()
print(json.dumps(max(seen) - before))
"""
COPY = 1.5
"""Share of the weights that a loader may hold at most: all of them, and what it works on."""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 MB in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=15, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="25MB")
    return folder


def peak(way: str, folder: Path, out: Path) -> int:
    """Return the most bytes that a process holds beyond those before it loads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", MEASURE, way, str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(json.loads(done.stdout))


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_weights_are_loaded_without_a_second_copy(way: str, sharded: Path, tmp_path: Path) -> None:
    if way == "gpu":
        pytest.importorskip("triton")
    files = list(sharded.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) > 3
    assert size > 90_000_000
    assert 0.9 * size < peak(way, sharded, tmp_path) < COPY * size


def test_a_second_copy_would_be_seen(sharded: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert peak("twice", sharded, tmp_path) > COPY * size


def test_blocks_and_a_conversion_take_no_copy_of_the_model(target_folder: Path, tmp_path: Path) -> None:
    assert peak("gguf", target_folder, tmp_path) < COPY * (target_folder / "model.gguf").stat().st_size
    converted = (target_folder / "model.safetensors").stat().st_size
    assert peak("conversion", target_folder, tmp_path) < 0.5 * converted
    assert (tmp_path / "model.safetensors").stat().st_size == converted
