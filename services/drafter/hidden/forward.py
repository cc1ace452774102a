"""The draft model's forward pass over packed sessions: one contract, for compiled code and for torch's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services.drafter.hidden.card import HiddenDraftFolder
from shared.errors import EngineError
from shared.kernels.cache import PackedBatch
from shared.models.folder import ModelFolder

Floats = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]
"""Trained weights by name, bfloat16 as its bits (`tensors.draft_tensors`)."""


class DraftPass(Protocol):
    """A loaded draft model, the parts of the target that it uses, and their KV cache."""

    head_ids: NDArray[np.int64]
    """Ascending ids of the tokens that it can propose."""

    def forward(self, tokens: list[int], before: Floats, batch: PackedBatch) -> Floats:
        """Compute a packed batch and keep its KV.

        before: the target's state before each token, (tokens, hidden size). Returns estimates of its state at the last
        token of each session, (sessions, hidden size), which the caller owns.
        """

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""

    def logits(self, estimates: Floats) -> Floats:
        """Return the logits of the tokens `head_ids`, (rows, tokens)."""

    def replacement(self, weights: Weights) -> Callable[[], None]:
        """Prepare other weights of the same shape; return the function that takes them into use.

        Preparing may take place in any thread; the function takes no time, and its call must not meet another one. The
        KV of earlier weights stays. Raises ModelError if a weight cannot be used.
        """


def draft_pass(
    draft: HiddenDraftFolder, target: ModelFolder, *, dtype: str, torch_device: str, threads: int, blocks: int
) -> DraftPass:
    """Load the draft for a torch device: compiled code computes it on the CPU. Raises ModelError and EngineError."""
    if torch_device == "cpu":
        from services.drafter.hidden.compiled_pass import CompiledDraft

        return CompiledDraft(draft, target, form=dtype, threads=threads, blocks=blocks)
    if dtype == "int8":
        raise EngineError(
            f"int8 weights of a draft model are computed on the CPU only, not on {torch_device}; set "
            "WISP_DRAFT_DTYPE=bfloat16"
        )
    import torch

    from services.drafter.hidden.module_pass import ModuleDraft

    torch.set_num_threads(threads)
    return ModuleDraft(draft, target, dtype=dtype, torch_device=torch_device, blocks=blocks)
