"""Rotary position embedding: transformers' frequencies in every variant, and a table with the same bits everywhere."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shared.models.description import NotDescribed, OutOfRange, Rope
from shared.models.rope import rope_of, rotation_table

HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_LEN = 131_072
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32_768,
    },
    "yarn without truncation": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    },
    "yarn with a scale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": None,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 4096,
    },
    "llama3": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, **LLAMA3},
    "llama3.2": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, **LLAMA3},
}


def default(rotary_size: int, theta: float = 10_000.0) -> Rope:
    return rope_of({"rope_type": "default", "rope_theta": theta}, rotary_size=rotary_size, max_len=MAX_LEN)


def assert_equal(rope: Rope, expected: tuple[torch.Tensor, float]) -> None:
    np.testing.assert_allclose(rope.inverse_frequencies, expected[0].numpy(), rtol=1e-6, atol=0)
    assert rope.scale == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_plain_frequencies_are_powers_of_theta(head_size: int, theta: float) -> None:
    rope = default(head_size, theta)
    exact = [theta ** (-2 * pair / head_size) for pair in range(head_size // 2)]
    np.testing.assert_allclose(rope.inverse_frequencies, exact, rtol=1e-6, atol=0)
    assert rope.scale == 1


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_scaled_frequencies_are_those_of_transformers(name: str, head_size: int) -> None:
    parameters = PARAMETERS[name]
    config = LlamaConfig(head_dim=head_size, max_position_embeddings=MAX_LEN, rope_parameters=dict(parameters))
    expected = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    assert_equal(rope_of(parameters, rotary_size=head_size, max_len=MAX_LEN), expected)


def test_dynamic_frequencies_are_the_unscaled_ones() -> None:
    rope = rope_of(PARAMETERS["dynamic"], rotary_size=64, max_len=MAX_LEN)
    assert rope == default(64)


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("options", [{}, {"attention_factor": 1.19}, {"factor": 16.0}])
def test_longrope_takes_the_factors_of_the_maximum_length(options: dict[str, float], longer: bool) -> None:
    random = np.random.default_rng(0)
    factors = {name: random.uniform(1, 40, 48).tolist() for name in ("short_factor", "long_factor")}
    parameters = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors, **options}
    max_len = MAX_LEN if longer else 4096
    config: PreTrainedConfig = Phi3Config(
        hidden_size=96 * 4,
        num_attention_heads=4,
        max_position_embeddings=max_len,
        original_max_position_embeddings=4096,
        rope_parameters=dict(parameters),
    )
    expected = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=max_len)
    parameters["original_max_position_embeddings"] = 4096
    assert_equal(rope_of(parameters, rotary_size=96, max_len=max_len), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_type": "proportional"}, "rope type 'proportional' is unknown"),
        ({"rope_type": None}, "rope_type null, not a string"),
        ({"rope_theta": -1.0}, "rope_theta -1.0, not a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta inf, not a positive number"),
        ({"mrope_section": [8, 12, 12]}, "unknown key mrope_section"),
        ({"rope_type": "linear"}, "no factor"),
        ({"rope_type": "linear", "factor": True}, "factor True, not a positive number"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "unknown key beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "finetuned": True}, "unknown key finetuned"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate 'no', not true or false"),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "high_freq_factor": 1.0}, "is not above low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 31, "long_factor": [1.0] * 32}, "31 values for 32 pairs"),
        ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0] * 32}, "not a list of positive numbers"),
    ],
)
def test_parameters_that_are_not_understood_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotDescribed, match=reason.replace("[", r"\[")):
        rope_of({"rope_type": "default", "rope_theta": 10_000.0, **changes}, rotary_size=64, max_len=MAX_LEN)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_type": "linear", "factor": 1e-320},
        {"rope_type": "linear", "factor": 1e-30},
        {"rope_type": "longrope", "short_factor": [1e-40] * 32, "long_factor": [1e-40] * 32},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e300},
        {"rope_theta": 1e-40},
    ],
)
def test_numbers_that_give_no_usable_angles_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(OutOfRange, match="the rope parameters"):
        rope_of({"rope_type": "default", "rope_theta": 10_000.0, **changes}, rotary_size=64, max_len=MAX_LEN)


def test_a_head_beyond_all_sense_is_refused_at_once() -> None:
    with pytest.raises(OutOfRange, match="100000000 rotated elements"):
        rope_of({"rope_type": "default", "rope_theta": 10_000.0}, rotary_size=10**8, max_len=MAX_LEN)


@pytest.mark.parametrize("rotary_size", [0, 33])
def test_rotated_elements_come_in_pairs(rotary_size: int) -> None:
    with pytest.raises(NotDescribed, match="not pairs"):
        default(rotary_size)


def test_a_table_has_the_cosines_and_sines_of_float32_angles() -> None:
    rope = default(128)
    cosines, sines = rotation_table(rope, 40_000)
    assert (cosines.dtype, cosines.shape, sines.dtype, sines.shape) == (np.float32, (40_000, 64)) * 2
    positions = np.arange(40_000, dtype=np.float32)
    angles = positions[:, None] * np.array(rope.inverse_frequencies, np.float32)
    assert angles.dtype == np.float32
    assert np.abs(cosines - np.cos(angles.astype(np.float64))).max() < 6e-8
    assert np.abs(sines - np.sin(angles.astype(np.float64))).max() < 6e-8


def test_a_table_is_exact_at_positions_in_the_millions() -> None:
    frequencies = (1.0, 0.5, 1e-3)
    cosines, sines = rotation_table(Rope(frequencies), 1 << 22)
    for position in (1 << 20, 3_000_001, (1 << 22) - 1):
        for pair, frequency in enumerate(frequencies):
            angle = float(np.float32(position) * np.float32(frequency))
            assert abs(cosines[position, pair] - math.cos(angle)) < 6e-8
            assert abs(sines[position, pair] - math.sin(angle)) < 6e-8


def test_a_table_is_scaled() -> None:
    rope = default(64)
    plain = rotation_table(rope, 100)
    for table, scaled in zip(plain, rotation_table(Rope(rope.inverse_frequencies, 1.5), 100), strict=True):
        np.testing.assert_array_equal(scaled, table * np.float32(1.5))


def test_a_longer_table_starts_with_the_shorter_one() -> None:
    rope = default(96)
    for long, short in zip(rotation_table(rope, 1000), rotation_table(rope, 333), strict=True):
        np.testing.assert_array_equal(long[:333], short)


DIGESTS = {
    "linear": "a1436af92825e678",
    "yarn": "bed0205c2e38ef27",
    "yarn with mscale": "e7687aad71d05f20",
    "llama3.2": "ad9bb1bb2fae3e6f",
}
"""Start of the SHA-256 of a table of 8192 positions and 128 elements, computed on one machine."""


@pytest.mark.parametrize("name", DIGESTS)
def test_a_table_has_the_same_bits_on_every_machine(name: str) -> None:
    rope = rope_of(PARAMETERS[name], rotary_size=128, max_len=MAX_LEN)
    digest = hashlib.sha256()
    for table in rotation_table(rope, 8192):
        digest.update(table.astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]
