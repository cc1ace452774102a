"""The engine: computes many sessions of one causal language model together, in packed steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from shared.engine.attention import NAME, BlockCache, Cache, GatherCache, PackedBatch, Probe
from shared.engine.blocks import BLOCK, BlockPool
from shared.engine.invariance import CANDIDATES, row_multiple
from shared.errors import BadStep, EngineError, ModelError, TooLong

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Step:
    """One session's part of a forward pass: new tokens after the cached ones, with logits for the last `rows`."""

    session: str
    tokens: Sequence[int]
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Output:
    """Logits (rows of all steps, vocabulary) in the model's dtype."""

    logits: torch.Tensor
    offsets: Sequence[int] = field(repr=False)

    def rows(self, step: int) -> slice:
        """Return the rows of the i-th step: `output.logits[output.rows(i)]`."""
        return slice(self.offsets[step], self.offsets[step + 1])


class Engine:
    """A model and its KV cache.

    The bits of a position's logits depend on the model, the dtype and the tokens up to it. They do not depend on the
    other sessions of a pass, on how tokens were split into steps, on caching, sharing, rollback or eviction, nor on
    the number of threads. Tested on the CPU in bfloat16 and float32; not claimed for other devices.

    Not thread-safe: one thread at a time. `threads` is torch's setting for the whole process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        threads: int = 1,
        budget_tokens: int = 16384,
        keep_hidden: bool = False,
    ) -> None:
        """folder: a Hugging Face model folder (config.json and safetensors). budget_tokens: KV budget, rounded down
        to blocks of 64 tokens. keep_hidden: keep final hidden states beside the KV, see `hidden`. Raises ModelError
        (folder or architecture unusable) and EngineError (a setting is invalid, or unusable on this machine).
        """
        if dtype not in DTYPES or budget_tokens < BLOCK or threads < 1:
            raise EngineError(
                f"dtype={dtype!r}, budget_tokens={budget_tokens}, threads={threads}: dtype must be one of "
                f"{', '.join(DTYPES)}, the budget at least {BLOCK} tokens, threads at least 1"
            )
        torch.set_num_threads(threads)
        self.threads = threads
        self._device = usable(device)
        self._model = load(folder, DTYPES[dtype]).to(self._device)
        config = self._model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_len: int = config.max_position_embeddings
        self._pool = BlockPool(budget_tokens // BLOCK)
        self.budget_tokens = self._pool.capacity * BLOCK
        multiple = row_multiple(self._model) if self._device.type == "cpu" else None
        self.batch_invariant = multiple is not None
        """True if the bits of logits are independent of the batch: found out at the start, see `invariance`."""
        self._row_multiple = multiple or max(CANDIDATES)
        # The hook holds the list, not the engine: a cycle would keep a dropped engine's weights in memory.
        self._states: list[torch.Tensor] = []
        keep = self._states.append
        self._model.base_model.register_forward_hook(lambda _module, _inputs, output: keep(output[0]))
        self._cache = self._make_cache(DTYPES[dtype])
        self._hidden = (
            torch.zeros(self._pool.capacity * BLOCK, self.hidden_size, dtype=DTYPES[dtype], device=device)
            if keep_hidden
            else None
        )

    @property
    def arithmetic(self) -> str:
        """Name of all that the bits of logits depend on beside model and dtype: see `shared.arithmetic`."""
        return module_arithmetic(self._device, self._model.dtype)

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

    def cached(self, session: str) -> int:
        """Return the number of the session's tokens whose KV is held; 0 if it is unknown or was evicted."""
        return self._pool.length(session)

    def attach(self, session: str, tokens: Sequence[int]) -> int:
        """Attach a session with its committed tokens; return `cached(session)`.

        KV that agrees with `tokens` is kept, the rest is dropped. Whole prefix blocks of other sessions, running or
        ended, are shared. At most `len(tokens) - 1` tokens stay cached, so that one token is left to compute, whose
        logits choose the next one.
        """
        return self._pool.attach(session, tokens)

    def hidden(self, session: str, start: int, stop: int) -> torch.Tensor:
        """Return the held final hidden states (after the model's last norm) at positions `start` to `stop`.

        The result is a copy, (rows, hidden size). The logits of token t + 1 come from the row at position t. The states
        lie in the blocks beside the KV, so a shared prefix has them too. Raises EngineError without `keep_hidden`.
        """
        if self._hidden is None:
            raise EngineError("this engine keeps no hidden states; make it with keep_hidden=True")
        stop = max(start, min(stop, self.cached(session)))
        return self._hidden[self._slots([(session, start, stop - start)])] if stop > start else self._hidden[:0].clone()

    @property
    def layout(self) -> str:
        """Layout of a block's bytes. Only engines of one model, dtype and layout can exchange blocks."""
        shapes = ["x".join(map(str, view.shape)) for view in self._views(0)]
        return f"{type(self._cache).__name__}-{'-'.join(shapes)}"

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
        views = list(self._cache.views(block))
        if self._hidden is not None:
            views.append(self._hidden[block * BLOCK : (block + 1) * BLOCK])
        return views

    def _slots(self, spans: Sequence[tuple[str, int, int]]) -> torch.Tensor:
        """Return the slots of positions in the blocks; each span is (session, first position, count)."""
        slots = []
        for session, start, count in spans:
            positions = np.arange(start, start + count)
            slots.append(np.asarray(self._pool.table(session))[positions // BLOCK] * BLOCK + positions % BLOCK)
        return torch.from_numpy(np.concatenate(slots)).to(self._device)

    def truncate(self, session: str, length: int) -> None:
        """Roll a session back to its first `length` tokens, in constant time, if more are held."""
        self._pool.truncate(session, length)

    def release(self, session: str) -> None:
        """Drop a session. Its full blocks stay for sessions with the same prefix until the room is needed."""
        self._pool.release(session)

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
        growth = self._pool.grow({step.session: len(step.tokens) for step in steps})
        try:
            for source, target in growth.copies:
                for there, here in zip(self._views(source), self._views(target), strict=True):
                    here.copy_(there)
            output = self._compute(steps)
        except BaseException:
            self._pool.undo(growth)
            raise
        for step in steps:
            self._pool.append(step.session, step.tokens)
        return output

    def _check(self, steps: Sequence[Step]) -> None:
        if not steps or len({step.session for step in steps}) < len(steps):
            raise BadStep(f"{len(steps)} steps: give at least one, and only one per session")
        for step in steps:
            count = len(step.tokens)
            if not 0 <= step.rows <= count or not count:
                raise BadStep(
                    f"session {step.session}: {step.rows} logit rows of {count} new tokens; feed at least one"
                )
            if min(step.tokens) < 0 or max(step.tokens) >= self.vocab_size:
                raise BadStep(f"session {step.session}: token ids must be from 0 to {self.vocab_size - 1}")
            length = self.cached(step.session) + count
            if length > self.max_len:
                raise TooLong(
                    f"session {step.session} would have {length} tokens, the model's context is {self.max_len}; "
                    "shorten the prompt or ask for fewer tokens"
                )

    def _compute(self, steps: Sequence[Step]) -> Output:
        starts = [self.cached(step.session) for step in steps]
        counts = [len(step.tokens) for step in steps]
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        offsets = [0]
        for step, start, count in zip(steps, starts, counts, strict=True):
            tokens.extend(step.tokens)
            positions.extend(range(start, start + count))
            wanted.extend(range(len(tokens) - step.rows, len(tokens)))
            offsets.append(len(wanted))
        padding = -len(tokens) % self._row_multiple
        self._cache.begin(PackedBatch([self._pool.table(step.session) for step in steps], starts, counts))
        logits, states = self._run(self._cache, tokens + [0] * padding, positions + [0] * padding, wanted)
        if self._hidden is not None:
            spans = [(step.session, start, count) for step, start, count in zip(steps, starts, counts, strict=True)]
            self._hidden[self._slots(spans)] = states[: len(tokens)]
        return Output(logits, offsets)

    def _run(
        self, cache: Cache | Probe, tokens: list[int], positions: list[int], wanted: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the packed row through the model; return logits of the wanted rows and final hidden states of all."""
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([tokens], device=self._device),
            "position_ids": torch.tensor([positions], device=self._device),
            "use_cache": False,
            "cache": cache,
        }
        if wanted:
            rows = torch.tensor(wanted + [0] * (-len(wanted) % self._row_multiple), device=self._device)
            logits = self._model(**inputs, logits_to_keep=rows).logits[0, : len(wanted)]
        else:
            self._model.base_model(**inputs)
            logits = torch.empty(0, self.vocab_size, dtype=self._model.dtype, device=self._device)
        states = self._states[-1][0]
        self._states.clear()
        return logits, states

    @torch.inference_mode()
    def _make_cache(self, dtype: torch.dtype) -> Cache:
        probe = Probe()
        self._run(probe, [0] * self._row_multiple, [0] * self._row_multiple, [0])
        if self._device.type == "cpu":
            return BlockCache(probe.shape(), self._pool.capacity, dtype, self.threads)
        return GatherCache(probe.shape(), self._pool.capacity, dtype, self._device)


def usable(device: str) -> torch.device:
    """Return the torch device of that name. Raises EngineError when torch cannot compute on it."""
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"device {device!r} cannot be used here ({reason}); WISP_DEVICE=cpu works everywhere"
        ) from error


def module_arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """Name the arithmetic of transformers' module code: the libraries and the kind of device.

    On the CPU, torch and its libraries choose kernels by instruction set and by the maker of the CPU. The number of
    threads changes no bits.
    """
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        kind = [torch.backends.cpu.get_cpu_capability()]
        if dtype is torch.bfloat16:
            kind += sorted(name for name, present in found.items() if name.endswith("bf16") and present)
        kind += str(found.get("cpu_name", "")).split()[:1]
    else:
        kind = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{libraries}, {' '.join((device.type, *kind))}"


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model in a folder, with our attention function. Raises ModelError."""
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder (it has no config.json); `wisp models prepare` makes one")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=NAME, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{type(model).__name__} cannot restrict its logits to some rows (logits_to_keep): unsupported"
        )
    return model.eval()  # type: ignore[no-untyped-call]
