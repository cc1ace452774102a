"""Memory that a model takes on a GPU: reckoned before it is loaded, within a share of the device's."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from services.tools.bench.gpu.random_models import RandomModel, configuration
from services.verifier.settings import VerifierSettings
from shared.errors import EngineError
from shared.gpu_kernels.memory import DeviceMemory, MemoryNeed, blocks_that_fit, need_of
from shared.gpu_kernels.parts import part_of
from shared.models.description import Linear

GIB = 1 << 30
A100 = DeviceMemory(free=39 * GIB, total=40 * GIB)
SMALL = MemoryNeed(weights=10 * GIB, buffers=GIB, block=GIB // 64)


def outputs_of(model: RandomModel, linear: Linear) -> int:
    return linear.weight.rows or model.shape(linear.weight.name)[0]


def need(name: str, ranks: int = 1, beside: int = 0) -> MemoryNeed:
    model = RandomModel(configuration(name))
    part = part_of(model.description, lambda one: outputs_of(model, one), 0, ranks).model
    return need_of(part, lambda one: outputs_of(model, one), "bfloat16", beside)


def test_weights_are_those_of_the_model() -> None:
    """Two bytes for each; norms are float32."""
    found = need("qwen3-8b")
    assert found.weights == pytest.approx(2 * RandomModel(configuration("qwen3-8b")).parameters, rel=1e-3)
    # 36 layers, 8 heads of 128, keys and values, two bytes, 64 tokens.
    assert found.block == 64 * 36 * 8 * 128 * 2 * 2
    assert 2 * GIB < found.buffers < 4 * GIB


def test_hidden_states_are_kept_beside_the_kv() -> None:
    assert need("qwen3-8b", beside=8192).block - need("qwen3-8b").block == 64 * 8192


def test_two_gpus_have_half_of_the_layers_and_of_the_kv() -> None:
    whole, half = need("qwen3-8b"), need("qwen3-8b", ranks=2)
    embedding = 2 * 151936 * 4096
    assert 2 * half.weights - whole.weights == pytest.approx(embedding, rel=0.01)
    assert 2 * half.block == whole.block


def test_kv_gets_the_rest_of_the_share() -> None:
    assert blocks_that_fit(SMALL, A100, 0.9, None, "it") == (36 - 11) * 64
    assert blocks_that_fit(SMALL, A100, 0.5, None, "it") == (20 - 11) * 64
    assert blocks_that_fit(SMALL, DeviceMemory(15 * GIB, 40 * GIB), 0.9, None, "it") == (15 - 11) * 64
    assert blocks_that_fit(SMALL, A100, 0.9, 70, "it") == 70


@pytest.mark.parametrize(
    ("memory", "share", "asked"),
    [(A100, 0.25, None), (A100, 0.9, 25 * 64 + 1), (DeviceMemory(11 * GIB, 40 * GIB), 0.9, None), (A100, 0.275, None)],
)
def test_a_model_that_does_not_fit_is_refused(memory: DeviceMemory, share: float, asked: int | None) -> None:
    with pytest.raises(EngineError, match=r"10\.00 GiB, buffers of 1\.00 GiB.*WISP_GPU_MEMORY=.* GiB free"):
        blocks_that_fit(SMALL, memory, share, asked, "the model and its KV")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_of_all_gpus_are_the_model(ranks: int) -> None:
    """Each weight's parts, put together, are the weight: by rows, or by columns where inputs are split."""
    model = RandomModel({**configuration("tiny"), "num_key_value_heads": 4, "vocab_size": 64 * ranks - 3})
    parts = [part_of(model.description, lambda one: outputs_of(model, one), rank, ranks) for rank in range(ranks)]
    (whole,) = model.description.layers
    layers = [part.model.layers[0] for part in parts]
    for pick in ("q", "k", "v", "out"):
        pieces = [
            part.reader(model.read)(getattr(layer.attention, pick).weight)
            for part, layer in zip(parts, layers, strict=True)
        ]
        joined = np.concatenate(pieces, axis=1 if pick == "out" else 0)
        assert np.array_equal(joined, model.read(getattr(whole.attention, pick).weight))
    for pick in ("gate", "up", "down"):
        pieces = [
            part.reader(model.read)(getattr(layer.mlp, pick).weight) for part, layer in zip(parts, layers, strict=True)
        ]
        joined = np.concatenate(pieces, axis=1 if pick == "down" else 0)
        assert np.array_equal(joined, model.read(getattr(whole.mlp, pick).weight))
    heads = [part.reader(model.read)(part.model.head.weight) for part in parts]
    assert np.array_equal(np.concatenate(heads), model.read(model.description.head.weight))


@pytest.mark.parametrize(("ranks", "reason"), [(3, "4 heads"), (4, "2 heads"), (7, "heads")])
def test_heads_that_cannot_be_shared_out_are_refused(ranks: int, reason: str) -> None:
    model = RandomModel(configuration("tiny"))
    with pytest.raises(EngineError, match=rf"{reason} in a layer cannot be split among {ranks} GPUs"):
        part_of(model.description, lambda one: outputs_of(model, one), 0, ranks)


def test_settings_of_several_gpus_are_checked() -> None:
    assert VerifierSettings(device="cuda", gpus=2).gpus == 2
    with pytest.raises(ValidationError, match="needs WISP_DEVICE=cuda"):
        VerifierSettings(gpus=2)
    with pytest.raises(ValidationError, match="WISP_KV_HANDOFF must be off"):
        VerifierSettings(device="cuda", gpus=2, kv_handoff="drain")
