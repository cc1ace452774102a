"""The check of a model's module code at load: sessions that are computed together, in steps, do not change each other.

transformers has hundreds of model types. Some keep a state outside of attention, some derive a value from the whole
batch: computed in packed steps, they would answer wrongly without an error. So a few random tokens of two sessions are
computed packed and split, alone, and by transformers itself. It costs five passes of a few tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.errors import ModelError
from shared.kernels.cache import PackedBatch

LENGTH, SPLITS = 10, (6, 3)
"""Tokens of each session, and the length of each one's first step."""
TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.15}
"""Most difference of a position's logits from transformers' own, as a share of their spread over the vocabulary. Other
orders of summation differ by less than 1e-4 in float32 and by up to 0.05 in bfloat16."""
STATEFUL = re.compile(r"Mamba|Rwkv|DeltaNet|Recurrent|ShortConv|LightningAttention|LinearAttention|LSTM|SSM|Griffin")
"""Classes whose layers carry a state from token to token."""


@dataclass(frozen=True, slots=True)
class Padding:
    """The token and the position of rows that fill a batch up, and how many there are at least."""

    token: int = 0
    position: int = 0
    least: int = 0


Run = Callable[[Sequence[int], PackedBatch, Padding], torch.Tensor]
"""Computes a packed batch with a cache of two blocks at least; returns the logits of all its rows."""


def refuse_stateful(decoder: torch.nn.Module) -> None:
    """Raise ModelError for layers that carry a state from token to token, which the KV cache does not hold."""
    for module in decoder.modules():
        name = type(module).__name__
        if STATEFUL.search(name) or isinstance(module, torch.nn.Conv1d):
            raise ModelError(
                f"its layers are recurrent or convolutional ({name}): they carry a state from token to token, and the "
                "engine keeps keys and values of attention only"
            )


@torch.inference_mode()
def check_sessions(
    model: Any, run: Run, max_len: int, torch_device: torch.device, vocabulary: Sequence[int], *, exact: bool
) -> bool:
    """Return whether logits have the same bits for a session alone and among others.

    model: with our attention. run: the pass to check. exact: no rounding depends on the batch, so that every difference
    is refused. Raises ModelError if results depend on other sessions or on steps, or are not those of transformers.
    """
    choose = random.Random(0)
    texts = [[choose.choice(vocabulary) for _ in range(LENGTH)] for _ in SPLITS]
    packed = _packed(run, texts, choose.choice(vocabulary))
    far = Padding(choose.choice(vocabulary), max_len - 1, least=1)
    alone = [run(text, PackedBatch([[0]], [0], [LENGTH]), far) for text in texts]
    tolerance = TOLERANCES[model.dtype]
    same_bits = all(torch.equal(one, other) for one, other in zip(packed, alone, strict=True))
    differences = torch.cat([_differences(one, other) for one, other in zip(packed, alone, strict=True)])
    # Where experts are nearly equal, a rounding error chooses another for a single token.
    if not (same_bits if exact else differences.median() <= tolerance):
        raise ModelError(
            "sessions that are computed together change each other's results, or results change with the steps that a "
            f"session is computed in (logits differ by up to {differences.max():.2%} of their spread)"
        )
    off = float(_differences(torch.cat(alone), _reference(model, texts, torch_device)).median())
    if not off <= tolerance:
        raise ModelError(
            f"its results differ from those of transformers (logits differ by {off:.0%} of their spread), so its code "
            "needs something that the engine does not have"
        )
    return same_bits


def _packed(run: Run, texts: Sequence[Sequence[int]], padding: int) -> list[torch.Tensor]:
    """Compute two sessions in two steps, packed, in turned order the second time; return the logits of each."""
    (first, second), (one, other) = texts, SPLITS
    before = run([*first[:one], *second[:other]], PackedBatch([[0], [1]], [0, 0], [one, other]), Padding(padding))
    rest = [LENGTH - other, LENGTH - one]
    after = run([*second[other:], *first[one:]], PackedBatch([[1], [0]], [other, one], rest), Padding(padding))
    return [torch.cat([before[:one], after[rest[0] :]]), torch.cat([before[one:], after[: rest[0]]])]


def _reference(model: Any, texts: Sequence[Sequence[int]], torch_device: torch.device) -> torch.Tensor:
    """Return the logits of transformers' own attention, for sessions that are not packed."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        if model.config._attn_implementation != "eager":
            raise ModelError("its attention cannot be exchanged")
        return model(torch.tensor(texts, device=torch_device), use_cache=False).logits.flatten(0, 1)  # type: ignore[no-any-return]
    finally:
        model.set_attn_implementation(ours)


def _differences(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return each position's difference, as a share of the spread of its logits."""
    difference = (logits.float() - reference.float()).square().mean(-1).sqrt()
    return difference / reference.float().std(-1).clamp(min=1e-6)
