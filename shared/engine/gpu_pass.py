"""The forward pass by Triton kernels, for models that a description covers (`families`), on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import triton

from shared.engine.weights import described
from shared.errors import EngineError
from shared.gpu_kernels.check import settle
from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.graphs import prepared_graphs
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK
from shared.models.description import NotDescribed

FORMATS = ("bfloat16", "float32")
"""Formats of weights that kernels for GPUs have, of those of the engine."""
CHECKED_TOKENS = 328
"""Tokens of the session that the check at load computes: more than a run of keys."""
KERNELS = "wisp-triton-1"
"""Identity of the kernels. It changes with the bits of any result."""


class GpuPass:
    """A described model on a GPU. The check at load computes sessions in several ways and compares their bits."""

    def __init__(self, folder: Path, *, form: str, torch_device: torch.device, blocks: int) -> None:
        """form: format of the weights. Raises NotDescribed (take `ModulePass`), ModelError and EngineError."""
        if form not in FORMATS:
            raise NotDescribed(f"kernels for GPUs have no {form} weights")
        self._device = torch_device
        failure = ""
        try:
            with _current(torch_device):
                self._decoder = _load(folder, form, torch_device, blocks)
                failure = self._settle(blocks)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{folder} in {form} and a KV of {blocks * BLOCK} tokens do not fit into the memory of {torch_device} "
                f"({_memory(torch_device)}). Lower WISP_CACHE_TOKENS, choose a smaller model, or free the GPU"
            ) from error
        if failure:
            del self._decoder  # module code needs the memory
            raise NotDescribed(f"the kernels for GPUs cannot run on {torch_device} ({failure})")
        model = self._decoder.model
        self.vocab_size, self.hidden_size, self.max_len = model.vocab_size, model.hidden_size, model.max_len
        self.arithmetic = gpu_arithmetic(torch_device)

    @torch.inference_mode()
    def _settle(self, blocks: int) -> str:
        """Run the kernels for the first time, and check them; return the reason if they cannot run."""
        graphs = prepared_graphs if self._device.type == "cuda" else None
        try:
            self.batch_invariant = settle(self._decoder, blocks, CHECKED_TOKENS, graphs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton's compiler, the C compiler that it needs, or the driver
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return ""

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return self._decoder.views(block)

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with _current(self._device):
            states, logits = self._decoder.forward(batch, tokens=tokens, wanted=wanted)
        return logits, states


def gpu_arithmetic(torch_device: torch.device) -> str:
    """Name the arithmetic: the kernels, their compiler, and the GPU's capability, whose instructions round."""
    kind = "interpreter"
    if torch_device.type == "cuda":
        kind = "capability {}.{}".format(*torch.cuda.get_device_capability(torch_device))
    return f"{KERNELS}, triton {triton.__version__}, {kind}"


def _current(torch_device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches, while the context lasts."""
    return torch.cuda.device(torch_device) if torch_device.type == "cuda" else nullcontext()


def _load(folder: Path, form: str, torch_device: torch.device, blocks: int) -> GpuDecoder:
    with described(folder, form) as (model, weights):
        return GpuDecoder(model, weights.read, form=form, blocks=blocks, torch_device=torch_device)


def _memory(torch_device: torch.device) -> str:
    if torch_device.type != "cuda":
        return "of the host"
    free, whole = torch.cuda.mem_get_info(torch_device)
    return f"{free / 2**30:.1f} of {whole / 2**30:.1f} GiB free"
