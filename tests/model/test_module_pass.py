"""Module code computes sessions together as transformers computes each alone, or refuses the model with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import WINDOW, alone_logits, expected_logits, packed_logits, random_texts, save
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from shared.engine import Engine, compiled_pass, module_pass
from shared.engine.invariance import PaddedRows, RowPadding, WeightProduct, row_padding
from shared.engine.masks import MASKS, MaskRule, UnknownMask, mask
from shared.errors import ModelError
from shared.models.description import NotDescribed

pytestmark = pytest.mark.slow

TEXTS = random_texts(3, 5 * WINDOW + 9)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0],
    "original_max_position_embeddings": 32,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": LONGROPE,
}


@pytest.fixture
def module_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let module code compute models that the compiled pass covers."""

    def refuse(*args: object) -> None:
        raise NotDescribed("for a test")

    monkeypatch.setattr(compiled_pass, "described", refuse)


def assert_exact(engine: Engine) -> None:
    """Check that logits are the same bits alone and in any batch and steps."""
    packed = packed_logits(engine, TEXTS)
    for text, logits in zip(TEXTS, packed, strict=True):
        assert torch.equal(alone_logits(engine, text), logits)


@pytest.mark.usefixtures("module_code")
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gemma2", {"attn_logit_softcapping": 2.0}),  # a soft cap and windows
        ("gpt_oss", {}),  # sinks
        ("gemma4_text", {}),  # two sizes of heads
        ("deepseek_v2", {}),  # values smaller than keys
        ("deepseek_v3", {}),
        ("llama4_text", {"floor_scale": 16}),  # chunks, and queries scaled by the position
        ("stablelm", {}),  # keywords do not reach the attention
        ("nemotron", {}),
        ("opt", {}),  # the outer model calls the decoder's inner part
        ("gpt2", {}),
        ("cohere2", {}),
        ("ministral3", {}),
        ("mistral3", {}),  # the part for texts of a model of images
        ("qwen3_vl", {}),
        ("gemma3", {}),
        ("qwen3_moe", {}),
    ],
)
def test_module_code_gives_the_logits_of_transformers(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path, model_type, **options)
    engine = Engine(folder, dtype="float32", budget_tokens=512)
    expected = expected_logits(folder, TEXTS)
    for logits, wanted in zip(packed_logits(engine, TEXTS), expected, strict=True):
        torch.testing.assert_close(logits, wanted, atol=5e-4, rtol=5e-4)
    assert engine.batch_invariant
    assert_exact(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "gpt_oss", "qwen2_moe"]
)
def test_experts_are_exact(model_type: str, dtype: str, tmp_path: Path) -> None:
    engine = Engine(save(tmp_path, model_type), dtype=dtype, budget_tokens=512)
    assert engine.batch_invariant
    assert_exact(engine)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 24, 1000])
@pytest.mark.parametrize("function", [torch.sigmoid, torch.nn.functional.silu, torch.cos])
def test_a_row_of_elements_has_the_same_bits_among_any_others(function: Any, width: int, threads: int) -> None:
    rows = 4 * torch.randn(99, width, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with PaddedRows(RowPadding(1, 64), threads):
            together = function(rows)
            assert torch.equal(function(rows[:1]), together[:1])
            for count in range(2, 99):
                assert torch.equal(function(rows[:count]), together[:count]), count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(150, 48), (1, 150, 48), (3, 150, 48)])
def test_slices_give_a_row_the_same_bits_among_any_others(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=random).to(dtype)
    weight = torch.randn(80, 48, generator=random).to(dtype)
    products: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda some: torch.nn.functional.linear(some, weight, torch.ones(80, dtype=dtype)),
        lambda some: torch.matmul(some, weight.T),
    ]
    for product in products:
        plain = product(rows)
        with PaddedRows(RowPadding(64, 64), 1):
            together = product(rows)
            assert together.shape == plain.shape
            torch.testing.assert_close(together, plain, atol=0.1, rtol=0.05)
            for count in (1, 2, 63, 64, 65, 129):
                assert torch.equal(product(rows[..., :count, :]), together[..., :count, :]), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2880, 512), (1024, 3072)])
def test_a_padding_holds_for_wide_products_of_many_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Beyond a hundred rows or so, libraries choose other kernels for weights stored by input."""
    product = WeightProduct(torch.matmul, shape, (shape[1], 1), dtype, has_bias=False)
    padding = row_padding([product])
    rows = torch.randn(600, shape[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if padding is None:  # nothing is promised on this machine
        return
    with PaddedRows(padding, 1):
        together = torch.matmul(rows, weight)
        for count in (1, 20, 64, 200, 400):
            for start in range(0, len(rows), count):
                part = rows[start : start + count]
                assert torch.equal(torch.matmul(part, weight), together[start : start + count]), (count, start)


@pytest.mark.parametrize("path", ["compiled", "module"])
@pytest.mark.parametrize("rope", ROPES)
def test_no_session_changes_the_angles_of_another(
    rope: str, path: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if path == "module":
        request.getfixturevalue("module_code")
    engine = Engine(save(tmp_path, "llama", rope_parameters=ROPES[rope]), dtype="float32", budget_tokens=512)
    assert bool(engine.module_code_reason) == (path == "module")
    assert_exact(engine)


@pytest.mark.parametrize("rope", ROPES)
def test_both_paths_have_the_same_angles(rope: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = save(tmp_path, "llama", rope_parameters=ROPES[rope])
    compiled = alone_logits(Engine(folder, dtype="float32", budget_tokens=512), TEXTS[0])
    request.getfixturevalue("module_code")
    other = alone_logits(Engine(folder, dtype="float32", budget_tokens=512), TEXTS[0])
    torch.testing.assert_close(other, compiled, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("falcon_h1", {}, r"recurrent or convolutional \(Conv1d\)"),
        ("diffllama", {}, "layer 0 attends twice"),
        ("jamba", {"attn_layer_offset": 0, "attn_layer_period": 4}, "recurrent or convolutional"),
        ("bamba", {"attn_layer_indices": [0]}, "recurrent or convolutional"),
        ("lfm2", {"layer_types": ["full_attention", "conv"] * 2}, "recurrent or convolutional"),
        ("granitemoehybrid", {"layer_types": ["attention", "mamba"] * 2}, "recurrent or convolutional"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"] * 2}, "recurrent or convolutional"),
        ("mamba", {}, "max_position_embeddings"),
        ("gptj", {}, "does not go through"),
        ("bloom", {}, "max_position_embeddings"),
        ("deepseek_v4", {}, "a mask of its own"),
        ("deepseek_v32", {}, "needs indices"),
        ("phimoe", {"rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}}, "change each other's"),
    ],
)
def test_a_model_that_would_answer_wrongly_is_refused(
    model_type: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"odels of type {model_type} cannot be served: .*{reason}"):
        Engine(save(tmp_path, model_type, **options))


@pytest.mark.parametrize("model_type", ["falcon_h1", "lfm2", "qwen3_next"])
def test_sessions_that_leak_are_seen_by_their_results(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where no name of a class gives the state away."""
    monkeypatch.setattr(module_pass, "refuse_stateful", lambda decoder: None)
    options = {
        "lfm2": {"layer_types": ["full_attention", "conv"] * 2},
        "qwen3_next": {"layer_types": ["full_attention", "linear_attention"] * 2},
    }
    with pytest.raises(ModelError, match="change each other's results"):
        Engine(save(tmp_path, model_type, **options.get(model_type, {})), dtype="float32")


@pytest.mark.usefixtures("module_code")
def test_arithmetic_that_is_not_that_of_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_pass.LayeredCache, "attend", scaled_wrongly(module_pass.LayeredCache.attend))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError, match="differ from those of transformers"):
            Engine(save(tmp_path, "llama"), dtype=dtype)


def scaled_wrongly(attend: Any) -> Any:
    return lambda self, layer, q, *others: attend(self, layer, 0 * q, *others)


@pytest.fixture
def masks() -> Iterator[None]:
    token = MASKS.set(True)
    yield
    MASKS.reset(token)


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (causal_mask_function, MaskRule()),
        (sliding_window_causal_mask_function(1), MaskRule(window=1)),
        (sliding_window_causal_mask_function(2), MaskRule(window=2)),
        (sliding_window_causal_mask_function(4096), MaskRule(window=4096)),
        (sliding_window_causal_mask_function(10**6), MaskRule()),
        (chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.int64)), MaskRule(chunk=8192)),
    ],
)
def test_masks_are_read_as_rules(function: Any, rule: MaskRule) -> None:
    found = mask(function, torch.device("cpu"))
    assert found is not None
    assert MaskRule.of(found, 131_072) == rule


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize(
    "function",
    [
        sliding_window_bidirectional_mask_function(8),
        and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 8, dtype=torch.int64))),
        or_masks(causal_mask_function, lambda b, h, q, k: k == q + 2),
        or_masks(sliding_window_causal_mask_function(50), lambda b, h, q, k: k % 7 == 3),
    ],
)
def test_other_masks_have_no_rule(function: Any) -> None:
    found = mask(function, torch.device("cpu"))
    assert found is not None
    with pytest.raises(UnknownMask):
        MaskRule.of(found, 4096)
