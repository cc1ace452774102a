"""`wisp bench gpu`: models of known shapes, and what it says without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from import_graph import ROOT

from services.tools.bench.gpu.random_models import SHAPES, RandomModel, configuration
from shared.models.bfloat16 import to_floats
from shared.models.description import weight_names


@pytest.mark.parametrize(("shape", "parameters"), [("smollm2-135m", 162.8e6), ("qwen3-8b", 8.19e9)])
def test_models_have_the_parameters_of_their_names(shape: str, parameters: float) -> None:
    """SmolLM2 ties its embedding and head, which are two tensors here."""
    assert RandomModel(configuration(shape)).parameters == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_description_can_have_fewer_layers(shape: str) -> None:
    assert len(RandomModel(configuration(shape, 1)).description.layers) == 1


def test_weights_are_normal_and_the_same_at_each_read() -> None:
    model = RandomModel(configuration("tiny"))
    names = list(weight_names(model.description))
    matrices = {name.name: model.read(name) for name in names}
    for name in names:
        assert np.array_equal(model.read(name), matrices[name.name])
    embedding = to_floats(matrices["model.embed_tokens.weight"])
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(matrices["model.embed_tokens.weight"], matrices["lm_head.weight"])


@pytest.mark.slow
def test_without_a_gpu_an_error_explains_that_nothing_is_measured() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "services.tools.bench.gpu"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "no NVIDIA GPU" in said or "need torch and Triton" in said
    assert "positions" not in said
