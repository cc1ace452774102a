"""GGUF files of every family that can be converted: logits are those of transformers' model of the same weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import tiny_gguf_families
import torch
from tiny import VOCAB
from tiny_gguf import Kind
from tiny_gguf_families import MODELS
from transformers import AutoModelForCausalLM

from shared.engine import Engine, Step
from shared.errors import ModelError
from shared.kernels.cache import PackedBatch
from shared.kernels.decoder import Decoder
from shared.kernels.weights import Floats
from shared.models.convert import convert_gguf
from shared.models.description import WeightName
from shared.models.families import describe
from shared.models.gguf_file import GgufFile
from shared.models.gguf_tensors import ARCHITECTURES, model_tensors
from shared.models.prepare import prepare

TOKENS = [7 * i % VOCAB for i in range(60)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model, which is made once."""

    @cache
    def made(name: str) -> Path:
        return MODELS[name][1](tmp_path_factory.mktemp(name))

    return made


def converted(folder: Path, to: Path, name: str, kind: Kind = Kind.F32) -> Path:
    return prepare(tiny_gguf_families.write(folder, to / f"{name}.gguf", MODELS[name][0], kind), to / "models")


def of_values(folder: Path, kv_form: str) -> Floats:
    """Logits of the values in the file, in float32."""
    tensors = model_tensors(GgufFile(folder / "model.gguf"))
    model = describe(json.loads((folder / "config.json").read_text()), tensors)

    def read(weight: WeightName) -> Floats:
        tensor = tensors[weight.name]
        part = tensor if weight.rows is None else tensor.part(weight.first_row, weight.rows)
        return np.ascontiguousarray(part.values())

    decoder = Decoder.of(model, read, form="float32", kv_form=kv_form, blocks=2, threads=1)
    batch = PackedBatch([[0, 1]], [0], [len(TOKENS)])
    return decoder.forward(batch, tokens=TOKENS, wanted=range(len(TOKENS)))[1]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "phi3-blocks"])
def test_a_file_gives_the_logits_of_transformers(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = of_values(converted(saved(name), tmp_path, name), "float32")
    assert expected.std() > 0.1
    assert np.abs(found - expected).max() < 1e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_blocks_of_joined_weights_keep_every_value(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """q, k and v of Phi-3 are rows of one tensor."""
    folder = converted(saved("phi3-blocks"), tmp_path, "phi3-blocks", Kind.Q8_0)
    engine = Engine(folder, dtype="gguf", budget_tokens=256)
    engine.attach("s", [])
    found = engine.forward([Step("s", TOKENS, len(TOKENS))]).logits.numpy()
    assert np.array_equal(found, of_values(folder, "bfloat16"))


def test_every_known_architecture_is_tried() -> None:
    assert {architecture for architecture, _ in MODELS.values()} == set(ARCHITECTURES)
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rope.scaling.type", "longrope", "the position embedding is scaled by 'longrope'"),
        ("rope.scaling.factor", 4.0, "the metadata llama.rope.scaling.factor (4.0) is not known here"),
        ("expert_count", 8, "the metadata llama.expert_count (8) is not known here"),
        ("attention.sliding_window", 64, "the metadata llama.attention.sliding_window (64) is not known here"),
        ("attention.value_length", 8, "keys and values have different sizes"),
    ],
)
def test_metadata_that_may_change_logits_is_refused(tmp_path: Path, name: str, value: object, reason: str) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", added={f"llama.{name}": value})
    with pytest.raises(ModelError, match=re.escape(reason)):
        convert_gguf(path, tmp_path, lambda doing, share: None)


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ([1.0] * 9, "rope_freqs.weight of shape (9,) has no 8 factors"),
        ([0.0] * 8, "rope_freqs.weight holds no factors"),
    ],
)
def test_factors_that_fit_no_pairs_are_refused(tmp_path: Path, factors: list[float], reason: str) -> None:
    weights = tiny_gguf.tensors() | {"rope_freqs.weight": np.array(factors, np.float32)}
    path = tiny_gguf.write(tmp_path / "model.gguf", weights, lambda name: Kind.F32)
    with pytest.raises(ModelError, match=re.escape(reason)):
        convert_gguf(path, tmp_path, lambda doing, share: None)


def test_a_family_that_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", architecture="glm4")
    with pytest.raises(ModelError, match=r"holds a glm4 model; of GGUF files, those of llama, qwen2, .* can be"):
        convert_gguf(path, tmp_path, lambda doing, share: None)
