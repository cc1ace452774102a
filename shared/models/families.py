"""Descriptions of the decoder families, read from a model folder's `config.json` and the names of its tensors.

A family lists the options that its models can have and the defaults of transformers. `describe` refuses a model with
anything else in its configuration: a key that is not known to leave the arithmetic alone may change it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shared.models.configuration import Configuration
from shared.models.description import (
    Activation,
    AttentionDescription,
    Inconsistent,
    LayerDescription,
    Linear,
    MlpDescription,
    ModelDescription,
    Norm,
    NotDescribed,
    OutOfRange,
    Rope,
    WeightName,
    renamed,
    weight_names,
)
from shared.models.family_options import FAMILIES, FULL, SLIDING, TEXT_PARTS, Family, RopeByType, Sizes, roped
from shared.models.rope import rope_of

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

LAYOUTS: dict[str, dict[str, str]] = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
"""Names of a layer's norms, by layout."""

IGNORED = frozenset({
    # The model's origin and the way to load it
    "_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers.js_config",
    "transformers_version", "_attn_implementation_autoset", "is_llama_config", "unsloth_fixed", "unsloth_version",
    # Training
    "attention_dropout", "embd_pdrop", "finetuning_task", "hidden_dropout", "initializer_range", "pretraining_tp",
    "problem_type", "resid_pdrop", "task_specific_params",
    # Classification
    "id2label", "label2id", "num_labels",
    # Output, sampling and stopping
    "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "max_length", "output_attentions",
    "output_hidden_states", "pad_token_id", "repetition_penalty", "return_dict", "sep_token_id", "temperature", "top_k",
    "top_p", "torchscript", "unk_token_id", "use_cache",
    # The pattern from which Gemma 3's layer_types were made
    "_sliding_window_pattern",
})  # fmt: skip
"""Keys that change nothing of what a decoder computes."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False, None),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}
"""Values that change nothing, by key, in the families that do not read the key."""


OTHER_PARTS = ("vision_tower.", "visual.", "multi_modal_projector.", "embed_vision.")
"""Beginnings of the names of tensors, after `model.`, that texts do not use."""
OF_OTHER_PARTS = frozenset({
    "boi_token_index", "eoi_token_index", "image_token_id", "image_token_index", "mm_tokens_per_image",
    "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "video_token_id", "vision_config",
    "vision_end_token_id", "vision_feature_layer", "vision_start_token_id",
})  # fmt: skip
"""Keys beside `text_config` that change nothing of what texts compute."""


def describe(config: Mapping[str, Any], tensors: Collection[str]) -> ModelDescription:
    """Return the description of the model with this `config.json` and these tensors. Of a model of images and texts it
    is that of the part for texts.

    Raises NotDescribed, with the reason, if the model has an option that a description cannot express or that is
    unknown here."""
    if config.get("quantization_config") is not None:
        raise NotDescribed("the weights are quantized (quantization_config)")
    if config.get("model_type") not in TEXT_PARTS:
        return _describe(config, tensors)
    values = Configuration(config)
    text = dict(values.optional_mapping("text_config") or {})
    if text.get("model_type") not in TEXT_PARTS[values.text("model_type")]:
        raise NotDescribed(f"text_config has model type {text.get('model_type')!r}")
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = values.flag("tie_word_embeddings")
    values.refuse_unread(IGNORED | OF_OTHER_PARTS)
    names = {plain: name for name in tensors if (plain := _name_in_text_part(name)) is not None}
    return renamed(_describe(text, names.keys()), names)


def _name_in_text_part(name: str) -> str | None:
    """Return the name that a tensor has in a model of texts only; None for those that texts do not use."""
    for prefix, plain in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return None if name.removeprefix("model.").startswith(OTHER_PARTS) else name


def _describe(config: Mapping[str, Any], tensors: Collection[str]) -> ModelDescription:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise NotDescribed(f"model type {kind!r} has no description")
    family = FAMILIES[kind]
    values = Configuration({**family.defaults, **config})
    if (layers := values.whole("num_hidden_layers")) > len(tensors):
        raise OutOfRange(f"config.json has {layers} layers, the folder only {len(tensors)} tensors")
    try:
        description = _model(family, values, tensors)
    except ArithmeticError as error:  # a number out of any usable range
        raise OutOfRange(f"a number of config.json is out of range ({error})") from error
    values.refuse_unread(IGNORED, {**NEUTRAL, **family.neutral})
    _check_tensors(description, tensors)
    return description


def _model(family: Family, config: Configuration, tensors: Collection[str]) -> ModelDescription:
    sizes = _sizes(family, config)
    embedding, head = _embedding_and_head(config.flag("tie_word_embeddings", family.tied), tensors)
    number = config.number if family.multipliers else lambda key, default: default
    return ModelDescription(
        vocab_size=config.whole("vocab_size"),
        hidden_size=sizes.hidden,
        max_len=sizes.max_len,
        embedding=embedding,
        layers=_layers(family, config, sizes, number("residual_multiplier", 1.0)),
        norm=_norm(family, config, "model.norm"),
        head=Linear(head),
        embedding_multiplier=(
            math.sqrt(sizes.hidden) if family.embedding_by_size else number("embedding_multiplier", 1.0)
        ),
        logit_multiplier=1 / number("logits_scaling", 1.0),
        logit_softcap=_softcap(family, config, "final_logit_softcapping"),
    )


def _sizes(family: Family, config: Configuration) -> Sizes:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    kv_heads = config.optional_whole("num_key_value_heads", ... if family.kv_heads_required else None) or heads
    head = config.optional_whole("head_dim", family.head_size)
    if head is None and hidden % heads:
        raise Inconsistent(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise Inconsistent(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    return Sizes(
        hidden=hidden,
        intermediate=config.whole("intermediate_size"),
        layers=config.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head=head or hidden // heads,
        max_len=config.whole("max_position_embeddings"),
    )


def _embedding_and_head(tied: bool, tensors: Collection[str]) -> tuple[WeightName, WeightName]:
    """Name the embedding and the head. Tied ones are one tensor, of either name, unless the folder has both: then
    transformers ties them only if they are equal, and each keeps its own here."""
    embedding, head = WeightName("model.embed_tokens.weight"), WeightName("lm_head.weight")
    if tied and head.name not in tensors:
        return embedding, embedding
    if tied and embedding.name not in tensors:
        return head, head
    return embedding, head


def _layers(
    family: Family, config: Configuration, sizes: Sizes, residual_multiplier: float
) -> tuple[LayerDescription, ...]:
    types = family.layer_types(config, sizes.layers)
    if len(types) != sizes.layers:
        raise Inconsistent(f"layer_types has {len(types)} entries for {sizes.layers} layers")
    for unknown in set(types) - {FULL, SLIDING}:
        raise NotDescribed(f"layer type {unknown!r} is unknown")
    window = None if family.window is ... else config.optional_whole("sliding_window", family.window)
    if SLIDING in types and window is None:
        raise NotDescribed("layers have a window, but sliding_window is not given")
    ropes = _ropes(family, config, sizes, types)
    attention = _Attention(
        family=family,
        config=config,
        sizes=sizes,
        scale=family.scale(config, sizes),
        softcap=_softcap(family, config, "attn_logit_softcapping"),
        bias=family.attention_bias and config.flag("attention_bias", False),
    )
    activation = _activation(family, config)
    mlp_bias = family.mlp_bias and config.flag("mlp_bias", False)
    layers = []
    for number, kind in enumerate(types):
        layer = f"model.layers.{number}"
        norms = {name: _norm(family, config, f"{layer}.{part}") for name, part in LAYOUTS[family.layout].items()}
        layers.append(
            LayerDescription(
                attention=attention.of(f"{layer}.self_attn", ropes[number], (window or 0) if kind == SLIDING else 0),
                mlp=_mlp(family, sizes, f"{layer}.mlp", activation, mlp_bias),
                attention_norm=norms.get("attention_norm"),
                mlp_norm=norms.get("mlp_norm"),
                attention_post_norm=norms.get("attention_post_norm"),
                mlp_post_norm=norms.get("mlp_post_norm"),
                residual_multiplier=residual_multiplier,
            )
        )
    return tuple(layers)


@dataclass(frozen=True, slots=True)
class _Attention:
    """The options that the attentions of all layers have in common."""

    family: Family
    config: Configuration
    sizes: Sizes
    scale: float
    softcap: float
    bias: bool

    def of(self, module: str, rope: Rope | None, window: int) -> AttentionDescription:
        family, sizes = self.family, self.sizes
        q_rows, kv_rows = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
        if family.fused:
            q, k, v = _rows(f"{module}.qkv_proj.weight", (q_rows, kv_rows, kv_rows))
        else:
            bias = self.bias or family.qkv_bias
            q, k, v = (_linear(f"{module}.{name}_proj", bias) for name in "qkv")
        normed = family.head_norms is not None
        return AttentionDescription(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_size=sizes.head,
            q=q,
            k=k,
            v=v,
            out=_linear(f"{module}.o_proj", self.bias),
            scale=self.scale,
            rope=rope,
            window=window,
            softcap=self.softcap,
            q_norm=_norm(family, self.config, f"{module}.q_norm") if normed else None,
            k_norm=_norm(family, self.config, f"{module}.k_norm") if normed else None,
            norms_whole_row=family.head_norms == "whole row",
        )


def _mlp(family: Family, sizes: Sizes, module: str, activation: Activation, bias: bool) -> MlpDescription:
    if family.fused:
        gate, up = _rows(f"{module}.gate_up_proj.weight", (sizes.intermediate, sizes.intermediate))
    else:
        gate, up = _linear(f"{module}.gate_proj", bias), _linear(f"{module}.up_proj", bias)
    return MlpDescription(gate=gate, up=up, down=_linear(f"{module}.down_proj", bias), activation=activation)


def _linear(module: str, bias: bool) -> Linear:
    return Linear(WeightName(f"{module}.weight"), WeightName(f"{module}.bias") if bias else None)


def _rows(tensor: str, counts: tuple[int, ...]) -> list[Linear]:
    """Split a tensor's rows."""
    return [Linear(WeightName(tensor, sum(counts[:i]), count)) for i, count in enumerate(counts)]


def _norm(family: Family, config: Configuration, module: str) -> Norm:
    return Norm(WeightName(f"{module}.weight"), config.number("rms_norm_eps", family.eps), family.norm_offset)


def _softcap(family: Family, config: Configuration, key: str) -> float:
    return (config.optional_number(key, family.softcaps[key]) or 0.0) if key in family.softcaps else 0.0


def _activation(family: Family, config: Configuration) -> Activation:
    name = config.text(family.activation_key, family.activation)
    name = family.activation_aliases.get(name, name)
    if name not in ACTIVATIONS:
        raise NotDescribed(f"activation {name!r} is unknown")
    return ACTIVATIONS[name]


def _ropes(family: Family, config: Configuration, sizes: Sizes, types: list[str]) -> list[Rope | None]:
    """Return the rope of each layer; equal ones are one object."""
    if family.rope_by_type is not None:
        by_type = _ropes_by_type(family, family.rope_by_type, config, sizes, set(types))
        return [by_type[kind] for kind in types]
    new, old = config.optional_mapping("rope_parameters"), config.optional_mapping("rope_scaling")
    if new and old:
        raise NotDescribed("config.json has both rope_parameters and rope_scaling")
    parameters = _renamed(family, new or old or {})
    for key in family.neutral_rope:
        parameters.pop(key, None)
    parameters.setdefault("rope_theta", config.number("rope_theta", family.theta))
    if "partial_rotary_factor" in config:
        parameters.setdefault("partial_rotary_factor", config.number("partial_rotary_factor"))
    original = config.optional_whole("original_max_position_embeddings", family.original_len)
    if original is not None and parameters["rope_type"] in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = original
    rope = _rope(family, parameters, sizes)
    if not family.skips_rope:
        return [rope] * sizes.layers
    return [rope if each else None for each in roped(config, sizes.layers)]


def _ropes_by_type(
    family: Family, by_type: RopeByType, config: Configuration, sizes: Sizes, types: set[str]
) -> dict[str, Rope]:
    """Return the ropes of the types of layers. In an old configuration `rope_scaling` is that of full attention."""
    new, old = config.optional_mapping("rope_parameters"), config.optional_mapping("rope_scaling")
    if new and old:
        raise NotDescribed("config.json has both rope_parameters and rope_scaling")
    for key, each in (new or {}).items():
        if key not in (FULL, SLIDING) or not isinstance(each, Mapping | None):
            raise NotDescribed(f"the rope parameters are not those of layer types: {key}")
    parameters = {kind: _renamed(family, (new or {}).get(kind) or {}) for kind in (FULL, SLIDING)}
    parameters[FULL] = _renamed(family, {**parameters[FULL], **(old or {})})
    theta, sliding_theta = config.number("rope_theta", family.theta), by_type.sliding_theta
    if by_type.sliding_theta_key is not None:
        sliding_theta = config.number(by_type.sliding_theta_key, sliding_theta)
    elif theta != sliding_theta and "rope_theta" not in parameters[SLIDING]:
        raise NotDescribed(f"rope_theta {theta} is not that of layers with a window, {sliding_theta}")
    parameters[FULL].setdefault("rope_theta", theta)
    parameters[SLIDING].setdefault("rope_theta", sliding_theta)
    for each in parameters.values():
        if each.pop("truncate", True) is not True:
            raise NotDescribed("truncate of a layer type's rope is not supported")
    return {kind: _rope(family, parameters[kind], sizes) for kind in types}


def _renamed(family: Family, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Copy parameters with `rope_type` in place of the older `type`, and its current name."""
    result = dict(parameters)
    older = result.pop("type", "default")
    kind = result.setdefault("rope_type", older)
    if isinstance(kind, str):
        result["rope_type"] = family.rope_aliases.get(kind, kind)
    return result


def _rope(family: Family, parameters: dict[str, Any], sizes: Sizes) -> Rope:
    share = Configuration(parameters, "the rope parameters").number("partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and not family.partial_rope):
        raise NotDescribed(f"partial_rotary_factor {share} is not supported")
    parameters.pop("partial_rotary_factor", None)
    return rope_of(parameters, rotary_size=int(sizes.head * share), max_len=sizes.max_len)


def _check_tensors(description: ModelDescription, tensors: Collection[str]) -> None:
    """Raise NotDescribed unless the folder has the description's tensors and no others."""
    named = {weight.name for weight in weight_names(description)}
    if missing := sorted(named - set(tensors)):
        raise Inconsistent(f"the folder has no tensor {missing[0]} ({len(missing)} are missing)")
    known = named | {name for name in tensors if name.endswith(".rotary_emb.inv_freq")}
    if unexpected := sorted(set(tensors) - known):
        raise Inconsistent(f"the folder has the unknown tensor {unexpected[0]} ({len(unexpected)} are unknown)")
