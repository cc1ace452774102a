"""The engine: computes many sessions of one causal language model together, in packed steps."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from shared.engine.blocks import BlockPool, Growth
from shared.engine.forward import DEFAULT_BLOCKS, ForwardPass, PassOptions, require_model_folder, usable
from shared.engine.steps import ChoiceRow, Step
from shared.errors import BadStep, EngineError, ModelError, TooLong
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK
from shared.messages.logprobs import TokenLogprob
from shared.models.description import Inconsistent, NotDescribed
from shared.models.weight_files import read_config
from shared.sampling.logprobs import logprobs_of
from shared.sampling.sampler import choose

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.bfloat16, "gguf": torch.bfloat16}
"""Type of kept hidden states, and of the weights in module code, by format of weights (`folder.DTYPES`)."""


@dataclass(frozen=True, slots=True)
class Output:
    """Logits (rows of all steps, vocabulary): float32 from the compiled pass, in the model's dtype from module code."""

    logits: torch.Tensor
    offsets: Sequence[int] = field(repr=False)

    def rows(self, step: int) -> slice:
        """Return the rows of the i-th step: `output.logits[output.rows(i)]`."""
        return slice(self.offsets[step], self.offsets[step + 1])

    def choose(self, rows: Sequence[ChoiceRow]) -> list[int]:
        """Return the model's token for each of these rows."""
        return choose(
            self.logits[[one.row for one in rows]],
            [one.sampling for one in rows],
            [one.position for one in rows],
            [one.processor for one in rows] if any(one.processor for one in rows) else (),
        )

    def wait(self) -> None:
        """Wait until the pass is computed, which an accelerator does in the background, and its logits are read."""
        self.logits.argmax(-1).tolist()

    def logprobs(self, rows: slice, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """Return the log-probability of a token in each of these rows, and the `top` most probable ones."""
        return logprobs_of(self.logits[rows].float().numpy(force=True), tokens, top)

    def bits(self, rows: slice) -> bytes:
        """Return the bits of rows of logits, from which tokens are chosen."""
        return self.logits[rows].contiguous().view(torch.uint8).numpy(force=True).tobytes()


class Engine:
    """A model and its KV cache.

    The bits of a position's logits depend on the model, the dtype and the tokens up to it. They do not depend on the
    other sessions of a pass, on how tokens were split into steps, on caching, sharing, rollback or eviction, nor on
    the number of threads. Tested on the CPU in bfloat16, float32 and int8. On NVIDIA GPUs the same is built into the
    kernels, which are tested in Triton's interpreter and have not run on a GPU yet; `batch_invariant` says what a check
    at load found. Not claimed for other devices.

    Not thread-safe: one thread at a time. `threads` is torch's setting for the whole process.
    """

    has_logits = True
    """False if the answers come without logits, as those of a twin."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        threads: int = 1,
        budget_tokens: int | None = 16384,
        keep_hidden: bool = False,
        gpu_memory: float = 1.0,
        gpus: int = 1,
    ) -> None:
        """folder: a Hugging Face model folder (config.json and safetensors). budget_tokens: KV budget, rounded down
        to blocks of 64 tokens; None for what a GPU's memory leaves, and 10,240 without kernels for GPUs. keep_hidden:
        keep final hidden states beside the KV, see `hidden`. gpu_memory: share of a GPU's memory that may be taken.
        gpus: GPUs that compute the model together, from `device` on. Raises ModelError (folder or architecture
        unusable) and EngineError (a setting is invalid, or unusable on this machine).
        """
        if dtype not in DTYPES or (budget_tokens is not None and budget_tokens < BLOCK) or threads < 1:
            raise EngineError(
                f"dtype={dtype!r}, budget_tokens={budget_tokens}, threads={threads}: dtype must be one of "
                f"{', '.join(DTYPES)}, the budget at least {BLOCK} tokens, threads at least 1"
            )
        torch.set_num_threads(threads)
        self.threads = threads
        self._torch_device = usable(device)
        self._tainted: set[int] = set()
        """Blocks whose KV may hold values that are not finite, as finite weights can overflow. The rest of a block is
        multiplied by zero in the attention of its next session, and zero times NaN is NaN: they are cleared before."""
        blocks = None if budget_tokens is None else budget_tokens // BLOCK
        options = PassOptions(dtype, self._torch_device, threads, blocks, keep_hidden, gpu_memory, gpus)
        self._pass, self.module_code_reason = _forward_pass(folder, options)
        """Reason for taking transformers' slower module code; empty for the compiled pass."""
        self._pool = BlockPool(self._pass.blocks)
        self.budget_tokens = self._pool.capacity * BLOCK
        self.vocab_size = self._pass.vocab_size
        self.hidden_size = self._pass.hidden_size
        self.max_len = self._pass.max_len
        self.batch_invariant = self._pass.batch_invariant
        """True if the bits of logits are independent of the batch."""
        self.arithmetic = self._pass.arithmetic
        """Identity of the arithmetic. Engines with the same one give the same bits for the same weights."""
        self._hidden = (
            torch.zeros(self._pool.capacity * BLOCK, self.hidden_size, dtype=DTYPES[dtype], device=device)
            if keep_hidden
            else None
        )

    @property
    def free_tokens(self) -> int:
        """Room available without evicting a session: free blocks, and prefix blocks that no session uses."""
        return self._pool.available * BLOCK

    @property
    def sessions(self) -> Sequence[str]:
        """Known sessions, least recently used first."""
        return self._pool.sessions

    @property
    def keeps_hidden(self) -> bool:
        """True if `hidden` is available."""
        return self._hidden is not None

    def cached(self, session_id: str) -> int:
        """Return the number of the session's tokens whose KV is held; 0 if it is unknown or was evicted."""
        return self._pool.length(session_id)

    def attach(self, session_id: str, tokens: Sequence[int]) -> int:
        """Attach a session with its committed tokens; return `cached(session)`.

        KV that agrees with `tokens` is kept, the rest is dropped. Whole prefix blocks of other sessions, running or
        ended, are shared. At most `len(tokens) - 1` tokens stay cached, so that one token is left to compute, whose
        logits choose the next one.
        """
        return self._pool.attach(session_id, tokens)

    def hidden(self, session_id: str, start: int, stop: int) -> torch.Tensor:
        """Return the held final hidden states (after the model's last norm) at positions `start` to `stop`.

        The result is a copy, (rows, hidden size). The logits of token t + 1 come from the row at position t. The states
        lie in the blocks beside the KV, so a shared prefix has them too. Raises EngineError without `keep_hidden`.
        """
        if self._hidden is None:
            raise EngineError("this engine keeps no hidden states; make it with keep_hidden=True")
        stop = max(start, min(stop, self.cached(session_id)))
        if stop <= start:
            return self._hidden[:0].clone()
        return self._hidden[self._slots([(session_id, start, stop - start)])]

    def hidden_bits(self, session_id: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Return the held hidden states at these positions as the bits of bfloat16; see `hidden`."""
        rows = self.hidden(session_id, start, stop)
        return rows.to(torch.bfloat16).view(torch.uint16).numpy(force=True)

    @property
    def layout(self) -> str:
        """Layout of a block's bytes. Only engines of one model, dtype and layout can exchange blocks."""
        shapes = ["x".join(map(str, view.shape)) for view in self._views(0)]
        return f"{type(self._pass).__name__}-{'-'.join(shapes)}"

    @property
    def block_bytes(self) -> int:
        """Size of a block in bytes: keys, values and, if kept, hidden states of `BLOCK` tokens."""
        return sum(view.numel() * view.element_size() for view in self._views(0))

    def has_block(self, name: bytes) -> bool:
        """Return whether the block with this identity (`blocks.block_names`) is held."""
        return self._pool.indexed(name) is not None

    def block(self, name: bytes) -> bytes | None:
        """Return the content of the block with this identity; None if it is not held."""
        if (block := self._pool.indexed(name)) is None:
            return None
        return b"".join(view.contiguous().view(torch.uint8).numpy(force=True).tobytes() for view in self._views(block))

    @torch.inference_mode()
    def adopt(self, name: bytes, content: bytes) -> bool:
        """Add a block that another engine computed, for sessions with its tokens that are attached later.

        Returns False if it is held already, or has no room without evicting a session. Raises EngineError when the
        content is not `block_bytes` long.
        """
        if len(content) != self.block_bytes:
            raise EngineError(f"a block of {len(content)} bytes; blocks of this engine have {self.block_bytes}")
        if (block := self._pool.adopt(name)) is None:
            return False
        buffer, start = bytearray(content), 0
        for view in self._views(block):
            view.copy_(torch.frombuffer(buffer, dtype=view.dtype, count=view.numel(), offset=start).view(view.shape))
            start += view.numel() * view.element_size()
        return True

    def _views(self, block: int) -> list[torch.Tensor]:
        """Return views of all tensors of a block."""
        views = list(self._pass.views(block))
        if self._hidden is not None:
            views.append(self._rows(block))
        return views

    def _rows(self, block: int) -> torch.Tensor:
        """Return a view of a block's hidden states."""
        assert self._hidden is not None
        return self._hidden[block * BLOCK : (block + 1) * BLOCK]

    def _slots(self, spans: Sequence[tuple[str, int, int]]) -> torch.Tensor:
        """Return the slots of positions in the blocks; each span is (session, first position, count)."""
        slots = []
        for session, start, count in spans:
            positions = np.arange(start, start + count)
            slots.append(np.asarray(self._pool.table(session))[positions // BLOCK] * BLOCK + positions % BLOCK)
        return torch.from_numpy(np.concatenate(slots)).to(self._torch_device)

    def truncate(self, session_id: str, length: int) -> None:
        """Roll a session back to its first `length` tokens, in constant time, if more are held."""
        self._pool.truncate(session_id, length)

    def release(self, session_id: str) -> None:
        """Drop a session. Its full blocks stay for sessions with the same prefix until the room is needed."""
        self._pool.release(session_id)

    def reset(self) -> None:
        """Drop the whole cache: every session and every prefix block."""
        self._pool = BlockPool(self._pool.capacity)

    def integrity(self) -> None:
        """Check the accounting of the cache (cheap enough while idle). Raises AssertionError, which names the fault."""
        self._pool.integrity()

    @torch.inference_mode()
    def forward(self, steps: Sequence[Step]) -> Output:
        """Compute all steps in one pass and keep their KV. Idle sessions are evicted if their room is needed.

        Raises NotAttached, TooLong, CacheFull or BadStep; then no session has changed.
        """
        self._check(steps)
        growth = self._pool.grow({step.session_id: len(step.tokens) for step in steps})
        try:
            self._clear_fresh(growth)
            for source, target in growth.copies:
                self._pass.copy_block(source, target)
                if self._hidden is not None:
                    self._rows(target).copy_(self._rows(source))
                if source in self._tainted:
                    self._tainted.add(target)
            output = self._compute(steps)
        except BaseException:
            self._pool.undo(growth)
            raise
        for step in steps:
            self._pool.append(step.session_id, step.tokens)
        return output

    def _clear_fresh(self, growth: Growth) -> None:
        """Clear tainted blocks that a session has newly got."""
        for session, former in growth.former.items():
            for block in self._tainted.intersection(self._pool.table(session)).difference(former):
                self._pass.clear_block(block)
                if self._hidden is not None:
                    self._rows(block).zero_()
                self._tainted.discard(block)

    def _check(self, steps: Sequence[Step]) -> None:
        if not steps or len({step.session_id for step in steps}) < len(steps):
            raise BadStep(f"{len(steps)} steps: give at least one, and only one per session")
        for step in steps:
            count = len(step.tokens)
            if not isinstance(step.rows, int) or not 0 <= step.rows <= count or not count:
                raise BadStep(
                    f"session {step.session_id}: {step.rows} logit rows of {count} new tokens; feed at least one"
                )
            try:
                array("q", step.tokens)
            except (TypeError, OverflowError) as error:
                raise BadStep(f"session {step.session_id}: token ids must be integers ({error})") from error
            if min(step.tokens) < 0 or max(step.tokens) >= self.vocab_size:
                raise BadStep(f"session {step.session_id}: token ids must be from 0 to {self.vocab_size - 1}")
            length = self.cached(step.session_id) + count
            if length > self.max_len:
                raise TooLong(
                    f"session {step.session_id} would have {length} tokens, the model's context is {self.max_len}; "
                    "shorten the prompt or ask for fewer tokens"
                )

    def _compute(self, steps: Sequence[Step]) -> Output:
        starts = [self.cached(step.session_id) for step in steps]
        counts = [len(step.tokens) for step in steps]
        tokens: list[int] = []
        wanted: list[int] = []
        offsets = [0]
        for step in steps:
            tokens.extend(step.tokens)
            wanted.extend(range(len(tokens) - step.rows, len(tokens)))
            offsets.append(len(wanted))
        batch = PackedBatch([self._pool.table(step.session_id) for step in steps], starts, counts)
        logits, states = self._pass.run(tokens, batch, wanted)
        if not torch.isfinite(states.sum()):
            self._tainted.update(block for table in batch.tables for block in table)
        if self._hidden is not None:
            spans = [(step.session_id, start, count) for step, start, count in zip(steps, starts, counts, strict=True)]
            self._hidden[self._slots(spans)] = states.to(self._hidden.dtype)
        return Output(logits, offsets)


def _kernel_pass(folder: Path, options: PassOptions) -> ForwardPass:
    """Return the compiled pass on the CPU, and that by Triton kernels on NVIDIA GPUs. Raises NotDescribed."""
    torch_device = options.torch_device
    if torch_device.type == "cpu":
        from shared.engine.compiled_pass import CompiledPass

        blocks = options.blocks or DEFAULT_BLOCKS
        return CompiledPass(folder, form=options.dtype, threads=options.threads, blocks=blocks)
    if torch_device.type != "cuda" or torch.version.hip:
        raise NotDescribed(f"kernels run on CPUs and NVIDIA GPUs, not on {torch_device}")
    try:
        from shared.engine.gpu_pass import GpuPass
    except ImportError as error:
        raise NotDescribed(f"the kernels for GPUs need Triton, which cannot be loaded ({error})") from error
    return GpuPass(folder, options)


def _forward_pass(folder: Path, options: PassOptions) -> tuple[ForwardPass, str]:
    """Return the pass by kernels if it covers model and device, else transformers' module code and the reason."""
    require_model_folder(folder)
    try:
        return _kernel_pass(Path(folder), options), ""
    except NotDescribed as error:
        doubt = error
    reason = str(doubt)
    if options.gpus > 1:
        raise EngineError(
            f"{folder} cannot be computed by {options.gpus} GPUs together, which needs the kernels for GPUs: {reason}. "
            "Leave WISP_GPUS out to compute it on one"
        )
    if options.dtype not in ("bfloat16", "float32"):
        if isinstance(doubt, Inconsistent):
            raise ModelError(f"{folder}: {reason}. Correct config.json, or download the model again.")
        raise EngineError(
            f"{options.dtype} weights need the compiled pass, which cannot take {folder}: {reason}. With "
            "WISP_DTYPE=bfloat16 or float32, transformers' module code may compute it; `wisp models check` tries"
        )
    from shared.engine.module_pass import ModulePass

    try:
        module_pass = ModulePass(
            folder,
            dtype=DTYPES[options.dtype],
            torch_device=options.torch_device,
            threads=options.threads,
            blocks=options.blocks or DEFAULT_BLOCKS,
        )
        return module_pass, reason
    except ModelError as error:
        if isinstance(doubt, Inconsistent):
            raise ModelError(f"{error} (The compiled pass does not take it either: {reason}.)") from error
        raise
    except EngineError:
        raise
    except Exception as error:  # a model's code can raise anything
        kind = read_config(folder).get("model_type")
        raise ModelError(
            f"{folder}: the engine cannot compute a model of model_type {kind} ({type(error).__name__}: {error}). Name "
            "another model's folder; `wisp models check FOLDER` tries one."
        ) from error
