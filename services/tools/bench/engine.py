"""`wisp bench engine`: time of the engine's passes against transformers, by operation, batch size and cached tokens.

Operations are a decode step, the verification of 1+4 and 1+8 tokens, and prefill. Both sides run in this process, in
turn, on the same weights and threads; figures are medians of the repetitions. All sessions of a batch have the same
length, so transformers needs no padding and no masks: its best case. Its cache is a DynamicCache; the time of growing
it by concatenation counts, the time of cropping it does not.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import Progress
from transformers import AutoModelForCausalLM, DynamicCache

from services.tools.bench.support.options import DtypeOption, EngineThreadsOption, ModelOption, target_folder
from services.tools.bench.support.report import report, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import DEFAULT_TARGET
from shared.engine import Engine, Step

BATCHES = (1, 4, 8, 16, 32)
CONTEXTS = (64, 256, 1024)
DECODE, VERIFY_4, VERIFY_8, PREFILL = "decode", "verify 1+4", "verify 1+8", "prefill 512"
NEW_TOKENS = {DECODE: 1, VERIFY_4: 5, VERIFY_8: 9, PREFILL: 512}
COLUMNS = ["operation", "sessions", "cached", "engine ms", "transformers ms", "speed-up"]


@dataclass(frozen=True)
class Cell:
    """One measured case: an operation on `sessions` sessions with `cached` cached tokens each."""

    operation: str
    sessions: int
    cached: int

    @property
    def new(self) -> int:
        """New tokens of each session."""
        return NEW_TOKENS[self.operation]

    @property
    def rows(self) -> int:
        """Positions of each session that need logits."""
        return 1 if self.operation == PREFILL else self.new


def cells(batches: tuple[int, ...], contexts: tuple[int, ...]) -> Iterator[Cell]:
    """Yield all cases, longest contexts first: shorter ones reuse the sessions, truncated."""
    for cached in sorted(contexts, reverse=True):
        for sessions in batches:
            for operation in (DECODE, VERIFY_4, VERIFY_8):
                yield Cell(operation, sessions, cached)
        yield Cell(PREFILL, 1, cached)
    yield Cell(PREFILL, 1, 0)
    yield Cell(PREFILL, 4, 0)


class EngineSide:
    """The engine with its sessions, filled once with different tokens."""

    def __init__(self, engine: Engine, sessions: int, length: int, tick: Callable[[], None]) -> None:
        self._engine = engine
        self._tokens = _tokens(engine.vocab_size, sessions, length + max(NEW_TOKENS.values())).tolist()
        for i, tokens in enumerate(self._tokens):
            engine.attach(str(i), [])
            engine.forward([Step(str(i), tokens[:length], rows=0)])
            tick()

    def once(self, cell: Cell) -> float:
        """Milliseconds of one pass."""
        steps = []
        for i in range(cell.sessions):
            self._engine.truncate(str(i), cell.cached)
            steps.append(Step(str(i), self._tokens[i][cell.cached : cell.cached + cell.new], cell.rows))
        start = time.perf_counter()
        self._engine.forward(steps)
        return (time.perf_counter() - start) * 1000


class TransformersSide:
    """transformers with its own attention and cache. The cached KV is random, which does not affect the time."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model.train(False)
        self._cache: Any = None
        self._held = (0, 0)

    @torch.inference_mode()
    def once(self, cell: Cell) -> float:
        """Milliseconds of one pass."""
        self._fill(cell.sessions, cell.cached)
        tokens = _tokens(self._model.config.vocab_size, cell.sessions, cell.new)
        start = time.perf_counter()
        self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=cell.rows)
        took_ms = (time.perf_counter() - start) * 1000
        if cell.cached:
            self._cache.crop(cell.cached - self._cache.get_seq_length())
        return took_ms

    def _fill(self, sessions: int, length: int) -> None:
        if self._held == (sessions, length) and length:
            return
        config = self._model.config
        self._cache = None
        gc.collect()
        self._cache = DynamicCache(config=config)
        shape = (sessions, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers if length else 0):
            self._cache.update(
                torch.randn(shape, dtype=self._model.dtype), torch.randn(shape, dtype=self._model.dtype), layer
            )
        self._held = sessions, length


def _tokens(vocab_size: int, sessions: int, count: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (sessions, count), generator=torch.Generator().manual_seed(sessions + count))


def measure(
    ours: EngineSide, theirs: TransformersSide, group: Sequence[Cell], repetitions: int
) -> dict[Cell, tuple[float, float]]:
    """Return median milliseconds of the engine and of transformers. Cells alternate; a first round warms up."""
    rounds = [{cell: (ours.once(cell), theirs.once(cell)) for cell in group} for _ in range(1 + repetitions)][1:]
    return {cell: (median(r[cell][0] for r in rounds), median(r[cell][1] for r in rounds)) for cell in group}


def findings(took: dict[Cell, tuple[float, float]]) -> list[str]:
    """Return sentences on the figures: the cost of verifying 1+8 tokens, and every case that is slower."""
    notes = []
    for cell, (ours, _) in took.items():
        if cell.operation == VERIFY_8 and cell.cached == 256:
            decode = took[Cell(DECODE, cell.sessions, cell.cached)][0]
            notes.append(
                f"{cell.sessions} sessions at 256 cached: verifying 1+8 tokens takes {ours / decode:.2f} decode steps"
            )
    slower = [(cell, ours / theirs) for cell, (ours, theirs) in took.items() if ours > theirs]
    for cell, ratio in slower:
        notes.append(
            f"slower than transformers: {cell.operation}, {cell.sessions} sessions, {cell.cached} cached: "
            f"{ratio:.2f} times the time"
        )
    notes.append(f"slower than transformers in {len(slower)} of {len(took)} cases")
    return notes


def main(
    model: ModelOption = DEFAULT_TARGET,
    dtype: DtypeOption = "bfloat16",
    threads: EngineThreadsOption = 1,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed passes of each case.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Measure few cases, in about a minute.")] = False,
) -> None:
    """Time the engine's passes against transformers."""
    with errors_shown():
        batches, contexts = ((1, 8), (64, 256)) if quick else (BATCHES, CONTEXTS)
        threads = threads or torch.get_num_threads()
        folder = target_folder(model, ConsoleProgress(terminal()))
        took = _measure_all(folder, dtype, threads, repetitions, batches, contexts)
        facts = {"model": folder.name, "dtype": dtype, "threads": threads, "repetitions": repetitions}
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
        title = f"Engine and transformers, {folder.name}, {dtype}, {threads} threads, medians of {repetitions}"
        report("engine", title, COLUMNS, _rows(took), facts=facts, notes=findings(took))


def _measure_all(
    folder: Path, dtype: str, threads: int, repetitions: int, batches: tuple[int, ...], contexts: tuple[int, ...]
) -> dict[Cell, tuple[float, float]]:
    longest = max(contexts) + max(NEW_TOKENS.values()) + 64
    engine = Engine(folder, dtype=dtype, threads=threads, budget_tokens=max(batches) * longest)
    theirs = TransformersSide(folder, dtype)
    planned = list(cells(batches, contexts))
    took: dict[Cell, tuple[float, float]] = {}
    with Progress(transient=True) as progress:
        bar = progress.add_task("filling the cache", total=max(batches))
        ours = EngineSide(engine, max(batches), max(contexts), lambda: progress.advance(bar))
        bar = progress.add_task("measuring", total=len(planned))
        # Operations on the same sessions alternate, so that a slow spell of the machine affects no ratio.
        for _, group in groupby(planned, key=lambda cell: (cell.sessions, cell.cached)):
            together = list(group)
            took |= measure(ours, theirs, together, repetitions)
            progress.advance(bar, len(together))
    return took


def _rows(took: dict[Cell, tuple[float, float]]) -> list[tuple[Any, ...]]:
    """Return the table's rows, by operation, cached tokens and sessions."""
    operations = list(NEW_TOKENS)
    ordered = sorted(took, key=lambda cell: (operations.index(cell.operation), cell.cached, cell.sessions))
    return [
        (cell.operation, cell.sessions, cell.cached, *took[cell], took[cell][1] / took[cell][0]) for cell in ordered
    ]


if __name__ == "__main__":
    typer.run(main)
