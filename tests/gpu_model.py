"""Decoders of kernels for GPUs on the CPU, in Triton's interpreter. Import it where Triton is installed only."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

from shared.engine.weights import opened
from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.launches import Launcher, launch
from shared.kernels.cache import PackedBatch
from shared.models.description import ModelDescription
from shared.models.families import describe
from shared.models.weight_files import read_config

_patch: Any = interpreter._patch_lang


def _patch_once(function: Any) -> Any:
    """Leave out the interpreter's search for what to patch in a function that a kernel calls: three times as fast."""
    languages = [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch(function)


interpreter._patch_lang = _patch_once


def gpu_decoder(
    folder: Path, form: str = "float32", *, blocks: int = 8, on: str = "cpu", launcher: Launcher = launch
) -> GpuDecoder:
    """Return the decoder of a model folder."""
    with opened(folder, "float32") as weights:
        model = describe(read_config(folder), weights.names)
        return GpuDecoder(
            model, weights.read, form=form, blocks=blocks, torch_device=torch.device(on), launcher=launcher
        )


def logits_of(
    decoder: GpuDecoder, tokens: Sequence[int], table: Sequence[int], counts: Sequence[int], start: int = 0
) -> torch.Tensor:
    """Compute a session's tokens in passes of these sizes; return the logits of all."""
    parts = []
    done = 0
    for count in counts:
        batch = PackedBatch([table], [start + done], [count])
        parts.append(decoder.forward(batch, tokens=tokens[done : done + count], wanted=range(count))[1])
        done += count
    assert done == len(tokens)
    return torch.cat(parts)


class FlawedDecoder:
    """Logits of a row are its token and its position, plus `flaw` for each row of the pass."""

    def __init__(self, model: ModelDescription, flaw: float) -> None:
        self.model, self.joins_runs = model, None
        self._flaw = flaw

    def forward(
        self, batch: PackedBatch, *, tokens: Sequence[int], wanted: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = [start + i for start, count in zip(batch.starts, batch.counts, strict=True) for i in range(count)]
        rows = torch.tensor([list(tokens), positions]).T.float()
        return rows, rows[list(wanted)] + self._flaw * len(rows)

    def views(self, block: int) -> list[torch.Tensor]:
        return []
