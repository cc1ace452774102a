"""Tensors whose shapes contradict the configuration are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import ModelError
from shared.models.families import describe
from shared.models.shapes import check_shapes

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
LAYER = "model.layers.0"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (512, 64),
    "lm_head.weight": (512, 64),
    "model.norm.weight": (64,),
    f"{LAYER}.input_layernorm.weight": (64,),
    f"{LAYER}.post_attention_layernorm.weight": (64,),
    f"{LAYER}.self_attn.q_norm.weight": (32,),
    f"{LAYER}.self_attn.k_norm.weight": (32,),
    f"{LAYER}.self_attn.q_proj.weight": (128, 64),
    f"{LAYER}.self_attn.q_proj.bias": (128,),
    f"{LAYER}.self_attn.k_proj.weight": (64, 64),
    f"{LAYER}.self_attn.k_proj.bias": (64,),
    f"{LAYER}.self_attn.v_proj.weight": (64, 64),
    f"{LAYER}.self_attn.v_proj.bias": (64,),
    f"{LAYER}.self_attn.o_proj.weight": (64, 128),
    f"{LAYER}.self_attn.o_proj.bias": (64,),
    f"{LAYER}.mlp.gate_proj.weight": (128, 64),
    f"{LAYER}.mlp.up_proj.weight": (128, 64),
    f"{LAYER}.mlp.down_proj.weight": (64, 128),
}
FUSED: dict[str, Any] = {
    **{key: value for key, value in CONFIG.items() if key not in ("attention_bias", "head_dim")},
    "model_type": "phi3",
}
FUSED_SHAPES: dict[str, tuple[int, ...]] = {
    **{name: shape for name, shape in SHAPES.items() if "self_attn" not in name and "mlp" not in name},
    f"{LAYER}.self_attn.qkv_proj.weight": (64 + 32 + 32, 64),
    f"{LAYER}.self_attn.o_proj.weight": (64, 64),
    f"{LAYER}.mlp.gate_up_proj.weight": (256, 64),
    f"{LAYER}.mlp.down_proj.weight": (64, 128),
}


def check(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    check_shapes(describe(config, shapes), shapes.__getitem__)


def test_shapes_that_fit_are_taken() -> None:
    check(CONFIG, SHAPES)
    check(FUSED, FUSED_SHAPES)


def test_a_gate_without_rows_is_refused() -> None:
    none = {f"{LAYER}.mlp.{name}_proj.weight": (0, 64) for name in ("gate", "up")}
    with pytest.raises(ModelError, match=r"gate_proj\.weight is 0 x 64, which leaves nothing"):
        check(CONFIG, {**SHAPES, **none, f"{LAYER}.mlp.down_proj.weight": (64, 0)})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tensor_of_another_shape_is_refused(name: str, axis: int) -> None:
    shape = list(SHAPES[name])
    if axis == len(shape):
        shape.append(1)  # a dimension more
    else:
        shape[axis] += 32
    with pytest.raises(ModelError, match=f"the tensor {LAYER if LAYER in name else name}.* is .* must be .*"):
        check(CONFIG, {**SHAPES, name: tuple(shape)})


def test_the_message_names_the_tensor_and_both_shapes() -> None:
    name = f"{LAYER}.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match=f"the tensor {name} is 96 x 64, and must be 64 x 64 by"):
        check(CONFIG, {**SHAPES, name: (96, 64)})


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
@pytest.mark.parametrize("change", [-32, 32])
def test_parts_of_one_tensor_fill_it(name: str, change: int) -> None:
    rows, columns = FUSED_SHAPES[f"{LAYER}.{name}.weight"]
    with pytest.raises(ModelError, match=rf"{name}\.weight is {rows + change} x 64, and must be {rows} x 64"):
        check(FUSED, {**FUSED_SHAPES, f"{LAYER}.{name}.weight": (rows + change, columns)})
