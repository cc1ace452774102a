"""The forward pass by Triton kernels, for models that a description covers (`families`), on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import triton

from shared.engine.followers import ClearBlock, CopyBlock, Followers, LoadPart, Meet, Pass, PrepareGraphs
from shared.engine.forward import DEFAULT_BLOCKS, PassOptions
from shared.engine.peers import GroupMembership, GroupPeers
from shared.engine.weights import Weights, described
from shared.errors import EngineError
from shared.gpu_kernels.check import settle
from shared.gpu_kernels.contracts import Announce, Graphs
from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.graphs import prepared_graphs
from shared.gpu_kernels.memory import DeviceMemory, blocks_that_fit, need_of
from shared.gpu_kernels.parts import OutputsOf, part_of
from shared.kernels.cache import PackedBatch
from shared.models.description import Linear, NotDescribed

FORMATS = ("bfloat16", "float32")
"""Formats of weights that kernels for GPUs have, of those of the engine."""
CHECKED_TOKENS = 328
"""Tokens of the session that the check at load computes: more than a run of keys."""
KERNELS = "wisp-triton-1"
"""Identity of the kernels. It changes with the bits of any result."""


class GpuPass:
    """A described model on one GPU or several. The check at load computes sessions in several ways and compares bits.

    With several GPUs, each has a process (`followers`) that computes its part of every pass; this one is the first.
    """

    def __init__(self, folder: Path, options: PassOptions) -> None:
        """Raises NotDescribed (take `ModulePass`), ModelError, and EngineError, before weights are loaded if the model
        does not fit into the memory."""
        if options.dtype not in FORMATS:
            raise EngineError(
                f"the kernels for GPUs have no {options.dtype} weights: they compute in {' or '.join(FORMATS)}. Set "
                "WISP_DTYPE=bfloat16 for every service"
            )
        self._torch_device = options.torch_device
        self._followers: Followers | None = None
        with described(folder, options.dtype) as (model, weights):
            part_of(model, outputs_of(weights), 0, options.gpus)  # refuses before processes are started
        if options.gpus > 1:
            self._followers = Followers(folder, options.dtype, devices_of(self._torch_device, options.gpus))
        try:
            if failure := self._load(folder, options):
                del self._decoder  # module code needs the memory
                raise NotDescribed(f"the kernels for GPUs cannot run on {self._torch_device} ({failure})")
        except BaseException:
            if self._followers:
                self._followers.close()
            raise
        self.vocab_size, self.hidden_size, self.max_len = model.vocab_size, model.hidden_size, model.max_len
        self.arithmetic = gpu_arithmetic(self._torch_device, options.gpus)

    def _load(self, folder: Path, options: PassOptions) -> str:
        """Load and check the model; return the reason if the kernels cannot run."""
        followers = self._followers
        membership = followers.membership if followers else None
        memories = [memory_of(self._torch_device), *(followers.memories() if followers else ())]
        self.blocks = fitting_blocks(folder, options, memories)
        if followers:
            followers.tell(LoadPart(self.blocks))
        try:
            with current(self._torch_device):
                self._decoder = load_part(
                    folder,
                    options.dtype,
                    self._torch_device,
                    self.blocks,
                    membership,
                    self._announce if followers else None,
                )
                if followers and membership:
                    followers.require_loaded(hardware_of(self._torch_device))
                    followers.watch()
                    followers.tell(Meet())
                    membership.join(self._torch_device)
                return self._settle()
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{folder} in {options.dtype} does not fit into the memory of {self._torch_device} "
                f"({memory_of(self._torch_device)}). Lower WISP_GPU_MEMORY or WISP_CACHE_TOKENS, or free the GPU"
            ) from error

    @torch.inference_mode()
    def _settle(self) -> str:
        """Run the kernels for the first time, and check them; return the reason if they cannot run."""
        graphs = self._prepared_graphs if self._torch_device.type == "cuda" else None
        try:
            self.batch_invariant = settle(self._decoder, self.blocks, CHECKED_TOKENS, graphs)
        except (torch.OutOfMemoryError, EngineError):
            raise
        except Exception as error:  # of Triton's compiler, the C compiler that it needs, or the driver
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return ""

    def _prepared_graphs(self, decoder: GpuDecoder) -> Graphs:
        self._tell(PrepareGraphs())
        return prepared_graphs(decoder)

    def _announce(self, batch: PackedBatch, tokens: Sequence[int], wanted: Sequence[int]) -> None:
        """Tell the followers of a pass that begins."""
        decoder = self._decoder
        with_graphs = decoder.graphs is not None
        self._tell(Pass(list(tokens), batch, list(wanted), decoder.wide_tiles, decoder.joins_runs, with_graphs))

    def _tell(self, message: object) -> None:
        if self._followers:
            self._followers.tell(message)

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return self._decoder.views(block)

    def copy_block(self, source: int, target: int) -> None:
        self._tell(CopyBlock(source, target))
        self._decoder.copy_block(source, target)

    def clear_block(self, block: int) -> None:
        self._tell(ClearBlock(block))
        self._decoder.clear_block(block)

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with current(self._torch_device):
            states, logits = self._decoder.forward(batch, tokens=tokens, wanted=wanted)
        return logits, states


def gpu_arithmetic(torch_device: torch.device, gpus: int = 1) -> str:
    """Name the arithmetic: the kernels, their compiler, the GPU's capability, whose instructions round, and the number
    of parts of each sum."""
    return f"{KERNELS}, triton {triton.__version__}, {hardware_of(torch_device)}" + (f", {gpus} parts" * (gpus > 1))


def hardware_of(torch_device: torch.device) -> str:
    """Name what computes."""
    if torch_device.type != "cuda":
        return "interpreter"
    return "capability {}.{}".format(*torch.cuda.get_device_capability(torch_device))


def current(torch_device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches, while the context lasts."""
    return torch.cuda.device(torch_device) if torch_device.type == "cuda" else nullcontext()


def memory_of(torch_device: torch.device) -> DeviceMemory | None:
    """Return a GPU's memory; None for the host's, which is not reckoned with."""
    return DeviceMemory(*torch.cuda.mem_get_info(torch_device)) if torch_device.type == "cuda" else None


def devices_of(first: torch.device, count: int) -> list[str]:
    """Return the devices of all ranks: consecutive GPUs. Raises EngineError if there are not so many."""
    if first.type != "cuda":
        return [str(first)] * count
    start, there = first.index or 0, torch.cuda.device_count()
    if start + count > there:
        raise EngineError(
            f"WISP_GPUS={count} from {first} on, and this node has {there} GPUs that torch can use. A model that needs "
            "more GPUs than one node has cannot be served"
        )
    return [f"cuda:{start + rank}" for rank in range(count)]


def fitting_blocks(folder: Path, options: PassOptions, memories: Sequence[DeviceMemory | None]) -> int:
    """Return the capacity of the KV cache that fits each GPU. Raises EngineError if the model does not fit."""
    with described(folder, options.dtype) as (model, weights):
        sizes = outputs_of(weights)
        part = part_of(model, sizes, 0, options.gpus).model
        hidden = model.hidden_size * (4 if options.dtype == "float32" else 2)
        found = []
        for number, memory in enumerate(memories):
            beside = hidden if options.keep_hidden and number == 0 else 0
            where = f"{folder} in {options.dtype} and its KV on {options.torch_device.type}:{number}"
            if memory is None:
                found.append(options.blocks or DEFAULT_BLOCKS)
                continue
            need = need_of(part, sizes, options.dtype, beside)
            found.append(blocks_that_fit(need, memory, options.gpu_memory, options.blocks, where))
    return min(found)


def load_part(
    folder: Path,
    form: str,
    torch_device: torch.device,
    blocks: int,
    membership: GroupMembership | None,
    announce: Announce | None = None,
) -> GpuDecoder:
    """Load a model, or the part of it that one rank computes. Raises NotDescribed, ModelError and EngineError."""
    rank, ranks = (membership.rank, membership.ranks) if membership else (0, 1)
    with described(folder, form) as (model, weights):
        part = part_of(model, outputs_of(weights), rank, ranks)
        return GpuDecoder(
            part.model,
            part.reader(weights.read),
            form=form,
            blocks=blocks,
            torch_device=torch_device,
            peers=GroupPeers(ranks) if ranks > 1 else None,
            announce=announce,
        )


def outputs_of(weights: Weights) -> OutputsOf:
    """Return what tells the number of outputs of a product."""

    def outputs(linear: Linear) -> int:
        rows = linear.weight.rows
        return rows if rows is not None else weights.shape(linear.weight.name)[0]

    return outputs
