"""`wisp bench formats`: quality, memory and speed of the target in each format of weights.

Quality has two figures: the perplexity on passages that were written for this benchmark (`passages.txt`), so no model
has been trained on them, and the share of positions at which the most probable token is the same as in float32. If
llama.cpp is installed (`wisp bench engine --install-llama`), it is measured with the same file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from services.tools.bench.engine import llama_package
from services.tools.bench.engine.arms import ArmProcess, ArmSizes, EngineArm
from services.tools.bench.engine.core.cases import EngineCase
from services.tools.bench.engine.core.results import EngineTimes, threads_of
from services.tools.bench.engine.measure import measure, started
from services.tools.bench.support.options import ModelOption, run_program, target_folder
from services.tools.bench.support.report import cpu_kind, report, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import DEFAULT_TARGET
from shared.errors import SettingsError
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

PASSAGES = Path(__file__).with_name("passages.txt")
CACHED = 256
DECODE, VERIFY = EngineCase("decode", 1, CACHED), EngineCase("verify 5", 1, CACHED)
REFERENCE = "wisp float32"
COLUMNS = [
    "arm",
    "perplexity",
    "top-1 as in float32, %",
    "weights, MB",
    "decode, ms",
    "verify 5, ms",
    "verify 5 / decode",
]


@dataclass(frozen=True)
class Predictions:
    """A model's scores of all passages, by the position in all of them together."""

    losses: Sequence[float]
    choices: Sequence[int]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(fmean(self.losses))

    def agreement(self, other: Predictions) -> float:
        """Return the share of positions with the same choice."""
        return fmean(a == b for a, b in zip(self.choices, other.choices, strict=True))


def passages(text: str) -> dict[str, str]:
    """Return the passages by title. A line "# title" begins a passage."""
    _, *parts = re.split(r"^# (.+)\n", text, flags=re.MULTILINE)
    return {title: passage.strip() for title, passage in zip(parts[::2], parts[1::2], strict=True)}


def predictions(process: ArmProcess, texts: Sequence[list[int]]) -> Predictions:
    """Score all texts with an arm."""
    scored = [process.score(tokens) for tokens in texts]
    return Predictions(
        [loss for losses, _ in scored for loss in losses], [one for _, choices in scored for one in choices]
    )


def rows_of(
    predicted: Mapping[str, Predictions], weights_mb: Mapping[str, float], times: EngineTimes
) -> list[list[Any]]:
    """Return the rows of the table, by arm. An arm without a measured memory has an empty cell."""
    reference = predicted.get(REFERENCE)
    return [
        [
            arm,
            round(one.perplexity, 3),
            one.agreement(reference) * 100 if reference else None,
            weights_mb.get(arm),
            times.median_ms(arm, DECODE),
            times.median_ms(arm, VERIFY),
            times.steps(arm, VERIFY),
        ]
        for arm, one in predicted.items()
    ]


def main(
    model: ModelOption = DEFAULT_TARGET,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repetitions: Annotated[int, typer.Option(min=1, help="Visits to each format.")] = 15,
) -> None:
    """Measure quality, memory and speed of the target in each format of weights."""
    with errors_shown():
        progress = ConsoleProgress(terminal())
        folder = target_folder(model, progress)
        model_folder = ModelFolder(folder)
        tokenizer = Tokenizer(model_folder)
        texts = [tokenizer.encode(passage) for passage in passages(PASSAGES.read_text("utf-8")).values()]
        notes: list[str] = []
        arms = [EngineArm("wisp", dtype, folder) for dtype in model_folder.dtypes] + llama_package.arms(model, notes)
        sizes = ArmSizes(threads, CACHED, sessions=1)
        with started(arms, sizes, progress, notes, measure_memory=True) as processes:
            if not processes:
                raise SettingsError("no format can be measured: " + "; ".join(notes))
            with progress.step("scoring the passages"):
                predicted = {process.arm.name: predictions(process, texts) for process in processes}
            weights_mb = {
                process.arm.name: process.facts["weights_mb"] for process in processes if "weights_mb" in process.facts
            }
            times = measure(processes, sizes, [DECODE, VERIFY], repetitions, progress)
        facts = {"model": folder.name, "threads": threads, "repetitions": repetitions, "tokens": sum(map(len, texts))}
        report(
            "formats",
            f"Formats of weights: {folder.name}, {threads_of(threads)}, {CACHED} cached tokens, {cpu_kind()}",
            COLUMNS,
            rows_of(predicted, weights_mb, times),
            facts=facts,
            notes=notes,
        )


if __name__ == "__main__":
    run_program(main, "wisp bench formats")
