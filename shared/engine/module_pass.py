"""The forward pass by transformers' module code: for models and devices that the compiled pass does not cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from shared.engine.attention import BlockCache, Cache, GatherCache, LayeredCache, Recorder, attending
from shared.engine.invariance import PaddedRows, RecordedProducts, RowPadding, row_padding
from shared.engine.loading import load
from shared.engine.positions import fix_positions
from shared.engine.session_check import Padding, check_sessions, refuse_stateful
from shared.engine.views import ViewedBlocks
from shared.errors import ModelError
from shared.kernels.cache import KvShape, PackedBatch, positions_of

RECORDED_ROWS = 32
"""Rows of the first pass, which records what the model does."""


class ModulePass(ViewedBlocks):
    """A model of transformers. Rows are padded so that matrix products have the same bits for any number of rows, where
    that is possible (`invariance`). A model whose sessions would change each other is refused (`session_check`)."""

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, torch_device: torch.device, threads: int, blocks: int
    ) -> None:
        """Raises ModelError."""
        self._torch_device, self._dtype, self._threads, self.blocks = torch_device, dtype, threads, blocks
        self._model = load(folder, dtype, torch_device).to(torch_device)
        config = self._model.config.get_text_config()
        with refusals(self._model.config.model_type):
            self.vocab_size: int = config.vocab_size
            self.hidden_size: int = config.hidden_size
            self.max_len = _max_len(config)
            self.arithmetic = module_arithmetic(torch_device, dtype)
            # The hook holds the list, not this object: a cycle would keep a dropped model's weights in memory.
            self._states: list[torch.Tensor] = []
            keep = self._states.append
            self._decoder = self._model.get_decoder() or self._model.base_model
            self._decoder.register_forward_hook(lambda _module, _inputs, output: keep(output[0]))
            self._padding: RowPadding | None = None
            self._prepare(blocks)

    @torch.inference_mode()
    def _prepare(self, blocks: int) -> None:
        """Make the cache and check the model. Raises ModelError."""
        refuse_stateful(self._decoder)
        fix_positions(self._model, self.max_len)
        vocabulary = _plain_tokens(self._model.config, self.vocab_size)
        recorder, rows = Recorder(self.max_len), list(range(RECORDED_ROWS))
        with RecordedProducts(self._model) as recorded:
            self._run(recorder, [vocabulary[7 * row % len(vocabulary)] for row in rows], rows, rows)
        if not recorder.layers:
            raise ModelError("its attention does not go through transformers' AttentionInterface")
        self._padding = row_padding(recorded.products) if self._torch_device.type == "cpu" else None
        exact = self._padding is not None and not recorded.unknown

        def check(tokens: Sequence[int], batch: PackedBatch, padding: Padding) -> torch.Tensor:
            return self._packed(small, tokens, batch, range(len(tokens)), padding)[0]

        small = self._make_cache(recorder, 2)
        same_bits = check_sessions(self._model, check, self.max_len, self._torch_device, vocabulary, exact=exact)
        self.batch_invariant = exact and same_bits
        self._states.clear()
        self._cache = self._make_cache(recorder, blocks)

    @property
    def _multiple(self) -> int:
        """Multiple that the packed row is padded to."""
        return RECORDED_ROWS if self._padding is None else self._padding.multiple

    def views(self, block: int) -> Sequence[torch.Tensor]:
        return self._cache.views(block)

    def run(
        self, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._packed(self._cache, tokens, batch, wanted, Padding())

    def _packed(
        self, cache: LayeredCache, tokens: Sequence[int], batch: PackedBatch, wanted: Sequence[int], fill: Padding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache.begin(batch)
        padding = fill.least + -(len(tokens) + fill.least) % self._multiple
        positions = [*positions_of(batch).tolist(), *([fill.position] * padding)]
        logits, states = self._run(cache, [*tokens, *([fill.token] * padding)], positions, wanted)
        return logits, states[: len(tokens)]

    def _run(
        self, cache: LayeredCache | Recorder, tokens: list[int], positions: list[int], wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the packed row through the model; return logits of the wanted rows and final hidden states of all."""
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([tokens], device=self._torch_device),
            "position_ids": torch.tensor([positions], device=self._torch_device),
            "use_cache": False,
        }
        padded = nullcontext() if self._padding is None else PaddedRows(self._padding, self._threads)
        with attending(cache, inputs["position_ids"][0]), padded:
            if wanted:
                rows = torch.tensor([*wanted, *([0] * (-len(wanted) % self._multiple))], device=self._torch_device)
                logits = self._model(**inputs, logits_to_keep=rows).logits[0, : len(wanted)]
            else:
                self._decoder(**inputs)
                logits = torch.empty(0, self.vocab_size, dtype=self._model.dtype, device=self._torch_device)
        states = self._states[-1][0]
        self._states.clear()
        return logits, states

    def _make_cache(self, recorder: Recorder, blocks: int) -> LayeredCache:
        def make(shape: KvShape) -> Cache:
            if self._torch_device.type == "cpu":
                return BlockCache(shape, blocks, self._dtype, self._threads)
            return GatherCache(shape, blocks, self._dtype, self._torch_device)

        return LayeredCache(recorder.layers, recorder.masks, make)


@contextmanager
def refusals(model_type: str) -> Iterator[None]:
    """Raise ModelError that names the model type for whatever goes wrong with a model's code."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code: it can raise anything
        reason = str(error) if isinstance(error, ModelError) else f"its code fails ({type(error).__name__}: {error})"
        raise ModelError(
            f"Models of type {model_type} cannot be served: {reason}. Choose a model of another type; "
            "shared/engine/MODELS.md lists those that run."
        ) from error


def _max_len(config: Any) -> int:
    """Return the most tokens of a session."""
    if not isinstance(length := getattr(config, "max_position_embeddings", None), int):
        raise ModelError("it has no max_position_embeddings, so that the length of its sessions is unknown")
    return length


def _plain_tokens(config: Any, vocab_size: int) -> Sequence[int]:
    """Return the ids that stand for text. Others, such as the place of an image, need an input of their own."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    return [token for token in range(min(vocab_size, 4096)) if token not in special] or range(vocab_size)


def module_arithmetic(torch_device: torch.device, dtype: torch.dtype) -> str:
    """Name the arithmetic of transformers' module code: the libraries and the kind of device.

    On the CPU, torch and its libraries choose kernels by instruction set and by the maker of the CPU. The number of
    threads changes no bits.
    """
    if torch_device.type == "cpu":
        found = torch.cpu.get_capabilities()
        kind = [torch.backends.cpu.get_cpu_capability()]
        if dtype is torch.bfloat16:
            kind += sorted(name for name, present in found.items() if name.endswith("bf16") and present)
        kind += str(found.get("cpu_name", "")).split()[:1]
    else:
        kind = [torch.cuda.get_device_name(torch_device)] if torch_device.type == "cuda" else []
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{libraries}, {' '.join((torch_device.type, *kind))}"
