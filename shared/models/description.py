"""A decoder's description: what the compiled forward pass has to compute, without tensors and without torch.

The decoders of one family differ only in options: Llama, Mistral, Qwen, Gemma, Granite, OLMo and Phi are all embedding,
layers of attention and gated MLP, a last norm, and a head. For one row x of one layer:

    x += residual_multiplier * post_norm(attention(norm(x)))
    x += residual_multiplier * post_norm(down(activation(gate(norm(x))) * up(norm(x))))

`families` reads a description from a model's configuration. Weights are named, not held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]


class NotDescribed(Exception):
    """A model cannot be expressed as a description; the message gives the reason."""


class Inconsistent(NotDescribed):
    """The configuration lacks a value or has one of another type, or does not fit the tensors: the files may be broken.

    transformers may still have a meaning for it."""


class OutOfRange(NotDescribed):
    """A number of the configuration is out of any usable range."""


@dataclass(frozen=True, slots=True)
class WeightName:
    """A tensor of the model folder, or some rows of one, as where Phi-3 keeps q, k and v in one tensor."""

    name: str
    first_row: int = 0
    rows: int | None = None
    """Number of rows from `first_row` on; None for all of the tensor."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with a weight of (outputs, inputs) and, if the model has one, a bias of (outputs,)."""

    weight: WeightName
    bias: WeightName | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm: x / sqrt(mean(x^2) + eps) * (offset + gain)."""

    gain: WeightName
    eps: float
    offset: float = 0.0
    """1 in Gemma, whose gains are stored as a difference from 1."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. Elements i and i + len(inverse_frequencies) of a head are a pair, rotated by
    position * inverse_frequencies[i]; elements beyond the pairs stay as they are."""

    inverse_frequencies: tuple[float, ...]
    """Float32 values."""
    scale: float = 1.0
    """Factor of cosine and sine (yarn's and longrope's attention factor)."""


@dataclass(frozen=True, slots=True)
class AttentionDescription:
    """Causal grouped-query attention. Head h of q reads head h // (heads // kv_heads) of k and v."""

    heads: int
    kv_heads: int
    head_size: int
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    scale: float
    """Factor of the scores, head_size ** -0.5 in most models."""
    rope: Rope | None
    """None for a layer without position embedding (some of SmolLM3's)."""
    window: int = 0
    """Number of the latest tokens that are attended to, the token itself included; 0 for all."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0 for none."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norms_whole_row: bool = False
    """True if q_norm and k_norm span all heads (OLMo 2), False if they norm each head (Qwen 3, Gemma 3)."""


@dataclass(frozen=True, slots=True)
class MlpDescription:
    """Gated MLP: down(activation(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Activation


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """One decoder layer. A norm that is None leaves its input as it is."""

    attention: AttentionDescription
    mlp: MlpDescription
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    residual_multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A whole decoder."""

    vocab_size: int
    hidden_size: int
    max_len: int
    """Most tokens of a session."""
    embedding: WeightName
    """(vocabulary, hidden size)."""
    layers: tuple[LayerDescription, ...]
    norm: Norm
    head: Linear
    """Names the embedding's tensor if they are tied."""
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float = 0.0
    """Logits become softcap * tanh(logit / softcap) after the multiplier; 0 for none."""

    @property
    def is_tied(self) -> bool:
        """True if the head is the embedding."""
        return self.head == Linear(self.embedding)


def weight_names(part: object) -> Iterator[WeightName]:
    """Yield every weight that a description, or a part of one, names."""
    if isinstance(part, WeightName):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from weight_names(each)
    elif is_dataclass(part):
        for each in fields(part):
            yield from weight_names(getattr(part, each.name))


def renamed(model: ModelDescription, names: Mapping[str, str]) -> ModelDescription:
    """Return a description with other names of its tensors."""

    def part(value: Any) -> Any:
        if isinstance(value, WeightName):
            return replace(value, name=names[value.name])
        if isinstance(value, tuple):
            return tuple(part(each) for each in value)
        if is_dataclass(value) and not isinstance(value, Rope):
            return replace(value, **{each.name: part(getattr(value, each.name)) for each in fields(value)})  # type: ignore[type-var]
        return value

    return part(model)  # type: ignore[no-any-return]
