"""Descriptions of the decoder families: they compute what transformers computes, or they are refused with a reason."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from described_decoder import DescribedDecoder, load
from import_graph import imports
from tiny import VOCAB
from tiny_families import FAMILIES, WINDOW
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3TextConfig

from shared.models.description import (
    Activation,
    AttentionDescription,
    LayerDescription,
    ModelDescription,
    NotDescribed,
)
from shared.models.families import describe

Saved = Callable[[str], tuple[dict[str, Any], set[str]]]

LENGTHS = (5 * WINDOW + 3, 2 * WINDOW + 5)


def described(folder: Path) -> ModelDescription:
    return describe(json.loads((folder / "config.json").read_text()), load(folder).keys())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_description_gives_the_logits_of_transformers(name: str, family: Callable[[str], Path]) -> None:
    folder = family(name)
    decoder = DescribedDecoder(described(folder), load(folder))
    auto_class = AutoModelForImageTextToText if "text-part" in name else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        tokens = torch.randint(VOCAB, (length,), generator=random)
        with torch.inference_mode():
            expected = model(tokens[None]).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(decoder.logits(tokens.tolist()), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def saved(family: Callable[[str], Path]) -> Saved:
    """The configuration and the names of the tensors of a family's model, which are read once."""

    @cache
    def read(name: str) -> tuple[dict[str, Any], set[str]]:
        folder = family(name)
        return json.loads((folder / "config.json").read_text()), set(load(folder))

    return read


def test_the_families_use_every_option_of_a_description(saved: Saved) -> None:
    used = set()
    for name in FAMILIES:
        model = describe(*saved(name))
        used |= {("model", option) for option in options(model)}
        for layer in model.layers:
            used |= {("layer", option) for option in options(layer)} | {("mlp", layer.mlp.activation)}
            used |= {("attention", option) for option in options(layer.attention)}
            used |= {("rope", "none")} if layer.attention.rope is None else set()
    every = {
        (part, each.name)
        for part, kind in (
            ("model", ModelDescription),
            ("layer", LayerDescription),
            ("attention", AttentionDescription),
        )
        for each in fields(kind)
        if each.default is not MISSING
    }
    assert used == every | {("mlp", activation) for activation in get_args(Activation)} | {("rope", "none")}


def options(part: Any) -> set[str]:
    """The fields with a default that have another value."""
    return {
        each.name for each in fields(part) if each.default is not MISSING and getattr(part, each.name) != each.default
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"torch_dtype": "bfloat16", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 2}),
        ("llama", {"clip_qkv": None, "problem_type": None}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 0}),
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 4096}),
        ("phi3", {"attention_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "auto_map": {"AutoConfig": "x"}}),
        ("smollm3", {"max_window_layers": 28, "layer_types": None, "no_rope_layers": None}),
    ],
)
def test_values_that_change_nothing_are_accepted(name: str, changes: dict[str, Any], saved: Saved) -> None:
    config, tensors = saved(name)
    assert describe({**config, **changes}, tensors) == describe(config, tensors)


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"model_type": "gpt_neox"}, "model type 'gpt_neox' has no description"),
        ("llama", {"model_type": ...}, "model type None has no description"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized"),
        ("llama", {"attention_chunk_size": 8192}, "unknown key attention_chunk_size"),
        ("llama", {"sliding_window": 4096}, "unknown key sliding_window"),
        ("llama", {"is_causal": False}, "is_causal False, which is not supported"),
        ("llama", {"is_causal": None}, "is_causal null, which is not supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved True, which is not supported"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is unknown"),
        ("llama", {"hidden_act": None}, "hidden_act null, not a string"),
        ("llama", {"hidden_size": ...}, "no hidden_size"),
        ("llama", {"hidden_size": "48"}, "hidden_size '48', not an integer"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers True, not an integer"),
        ("llama", {"head_dim": ..., "num_attention_heads": 5}, "hidden_size 48 is no multiple"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads 5 is no multiple of num_key_value_heads 2"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps 0.0, not a positive number"),
        ("llama", {"attention_bias": 1}, "attention_bias 1, not true or false"),
        ("llama", {"attention_bias": True}, "no tensor model.layers.0.self_attn.k_proj.bias"),
        ("llama-biases", {"attention_bias": False}, "unknown tensor model.layers.0.self_attn.k_proj.bias"),
        ("llama", {"num_hidden_layers": 1}, "unknown tensor model.layers.1"),
        ("llama", {"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ("llama-biases", {"tie_word_embeddings": False}, "no tensor lm_head.weight"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "both rope_parameters and rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope type 'axial' is unknown"),
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"),
        ("llama", {"rope_parameters": {"full_attention": ROPE}}, "unknown key full_attention"),
        ("llama", {"rope_parameters": ["default"]}, "not an object"),
        ("mistral", {"attention_bias": True}, "attention_bias True, which is not supported"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "unknown key layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0, not an integer from 1"),
        ("mistral", {"num_key_value_heads": ...}, "no num_key_value_heads"),
        ("qwen2", {"use_mrope": True}, "use_mrope True, which is not supported"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer type 'chunked_attention' is unknown"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 2 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window or sliding_window is off"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}, "rope_parameters": None}, "type 'mrope'"),
        ("qwen3-windows", {"sliding_window": None}, "use_sliding_window or sliding_window is off"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "not a list with 1 or 0 for each layer"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "not a list with 1 or 0 for each layer"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True, which is not supported"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation 'relu', which is not supported"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping 0, not a positive number"),
        ("gemma2", {"sliding_window": None}, "layers have a window, but sliding_window is not given"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0, which is not supported"),
        ("gemma3", {"rope_parameters": ROPE}, "the rope parameters are not those of layer types"),
        ("gemma3-old", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "unknown key factor"),
        ("granite", {"logits_scaling": None}, "logits_scaling null, not a positive number"),
        ("olmo2", {"clip_qkv": 8.0}, "unknown key clip_qkv"),
        ("olmo3-old", {"rope_theta": 10_000.0}, "rope_theta 10000.0 is not that of layers with a window"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}},
            "truncate of a layer type's rope is not supported",
        ),
        ("phi3", {"mlp_bias": True}, "mlp_bias True, which is not supported"),
        ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5 is not"),
        ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.6}}, "7 rotated elements"),
        ("phi3-long", {"rope_parameters": {"rope_type": "longrope", "short_mscale": 1.2}}, "no short_factor"),
    ],
)
def test_a_model_that_a_description_cannot_express_is_refused(
    name: str,
    changes: dict[str, Any],
    reason: str,
    saved: Saved,
) -> None:
    config, tensors = saved(name)
    changed = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    with pytest.raises(NotDescribed, match=re.escape(reason)):
        describe(changed, tensors)


def test_sizes_that_gemma_3_leaves_out_are_those_of_transformers() -> None:
    given = {"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 80}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**given))
    tensors = set(model.state_dict()) - {"lm_head.weight"}
    everything = json.loads(Gemma3TextConfig(**given).to_json_string())
    assert everything["vocab_size"] == 262_208
    assert describe(given, tensors) == describe(everything, tensors)
    text_part = {"model_type": "gemma3", "text_config": given, "vision_config": {}, "image_token_index": 262_144}
    of_images = {"vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"}
    names = {f"language_model.{name}" for name in tensors} | of_images
    assert describe(text_part, names).max_len == 131_072


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_config": {"model_type": "gemma2"}}, "text_config has model type 'gemma2'"),
        ({"text_config": None}, "text_config has model type None"),
        ({"text_only_scale": 2}, "unknown key text_only_scale"),
    ],
)
def test_a_text_part_that_a_description_cannot_express_is_refused(
    changes: dict[str, Any], reason: str, saved: Saved
) -> None:
    config, tensors = saved("gemma3-text-part")
    with pytest.raises(NotDescribed, match=reason):
        describe({**config, **changes}, tensors)


def test_tied_weights_are_one_tensor_of_either_name(
    saved: Saved,
) -> None:
    config, tensors = saved("qwen2")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for names, expected in (
        ({embedding}, (embedding, embedding)),
        ({head}, (head, head)),
        ({embedding, head}, (embedding, head)),
    ):
        model = describe(config, (tensors - {embedding}) | names)
        assert (model.embedding.name, model.head.weight.name) == expected


def test_frequencies_saved_by_old_versions_are_no_weights(
    saved: Saved,
) -> None:
    config, tensors = saved("llama")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)}
    assert describe(config, tensors | buffers) == describe(config, tensors)
    with pytest.raises(NotDescribed, match=r"unknown tensor score\.weight"):
        describe(config, tensors | {"score.weight"})


def test_a_description_needs_no_torch() -> None:
    """No module behind it imports torch or transformers. (The package's own `__init__` loads nothing.)"""
    modules = [f"shared.models.{name}" for name in ("description", "families", "rope")]
    loaded = {found for module in modules for found in model_modules(module)}
    imported = {found.module.split(".")[0] for module in loaded for found in imports(module)}
    assert imported <= {"shared", "numpy", *sys.stdlib_module_names}


def model_modules(module: str) -> set[str]:
    """The module and the modules beside it that it imports, directly or not."""
    found = {module}
    for each in imports(module):
        if each.module.startswith("shared.models."):
            found |= model_modules(each.module)
    return found


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**8}, {"rms_norm_eps": 10**400}, {"rope_parameters": {"rope_theta": 1e-320}}]
)
def test_numbers_beyond_all_sense_are_refused(saved: Saved, change: dict[str, object]) -> None:
    config, tensors = saved("llama")
    with pytest.raises(NotDescribed):
        describe({**config, **change}, tensors)
