"""`wisp bench gpu`: bits of the kernels for GPUs however sessions are computed, speeds, and cost models.

Exactness: sessions of a model with random weights are computed in several ways, and the bits of all logits compared
with those of one prefill; the default model answers prompts alone and under load. Speed: steps of 1 to 256 sessions
that decode, verify 5 or 9 tokens, and a prompt; the share of the memory's bandwidth that reading weights and KV
reaches; products against cuBLAS, and steps against transformers. Calibration: target profiles for the simulator and
twins. Suite, which only `--steps suite` runs: the capacity of ways of serving, with the target computed on the GPU.

Each step is a process with a time limit of its own. After each one, the results so far are written. `--tiny` runs all
of it on the CPU, the kernels in Triton's interpreter, to try the program. Its times mean nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from services.tools.bench.gpu.plan import (
    ARMS,
    DEFAULT_KINDS,
    FORMS,
    INTERPRETER_SLOWNESS,
    KINDS,
    MODELS,
    TABLES,
    TINY_PLAN,
    GpuPlan,
    steps_of,
)
from services.tools.bench.gpu.runner import StepOutcome, StepRunner
from services.tools.bench.gpu.verdict import LACKING, verdicts
from services.tools.bench.load.arms import arms_of
from services.tools.bench.support.options import run_program, some_of, whole_numbers, words
from services.tools.bench.support.report import machine, records, table, terminal, write_record, written
from services.tools.cli.terminal import errors_shown
from services.tools.local.folder import state_folder
from shared.errors import EngineError

STEP_COLUMNS = ["step", "outcome", "seconds", "rows", "reason"]
STEPS_PANEL = "Steps"
MODELS_PANEL = "Models"
SIZES_PANEL = "Sizes of a step"
RESULTS_PANEL = "Results"


def main(
    models: Annotated[
        str, typer.Option(help="Shapes of models: smollm2-135m, qwen3-8b.", rich_help_panel=MODELS_PANEL)
    ] = ",".join(MODELS),
    formats: Annotated[
        str, typer.Option(help="Formats of weights for exactness.", rich_help_panel=MODELS_PANEL)
    ] = ",".join(FORMS),
    steps: Annotated[
        str,
        typer.Option(
            help=f"Kinds of steps: some of {', '.join(KINDS)}. suite needs RabbitMQ and Redis.",
            rich_help_panel=STEPS_PANEL,
        ),
    ] = ",".join(DEFAULT_KINDS),
    calibrated: Annotated[
        str,
        typer.Option(
            help="Shapes to calibrate: those of --models, and qwen3-32b where the memory allows.",
            rich_help_panel=MODELS_PANEL,
        ),
    ] = "smollm2-135m,qwen3-8b,qwen3-32b",
    layers: Annotated[
        int, typer.Option(min=1, help="Most layers of a model, for speeds too.", rich_help_panel=MODELS_PANEL)
    ] = 8,
    positions: Annotated[
        int, typer.Option(min=8, help="Positions for exactness, in each way.", rich_help_panel=SIZES_PANEL)
    ] = 2000,
    texts: Annotated[
        int, typer.Option(min=1, help="Texts to compare under load and alone.", rich_help_panel=SIZES_PANEL)
    ] = 20,
    sessions: Annotated[str, typer.Option(help="Sessions of a step.", rich_help_panel=SIZES_PANEL)] = "1,8,32,128,256",
    context: Annotated[
        int, typer.Option(min=16, help="Held tokens of each session.", rich_help_panel=SIZES_PANEL)
    ] = 512,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Steps of each measurement.", rich_help_panel=SIZES_PANEL)
    ] = 10,
    arms: Annotated[
        str, typer.Option(help="Ways of serving of the step suite.", rich_help_panel=STEPS_PANEL)
    ] = ",".join(ARMS),
    minutes: Annotated[
        float, typer.Option(min=0.5, help="Time of all steps together.", rich_help_panel=STEPS_PANEL)
    ] = 7.7,
    to: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of results. \\[default: .wisp/results]", rich_help_panel=RESULTS_PANEL),
    ] = None,
    tiny: Annotated[
        bool, typer.Option(help="Try everything on the CPU, in Triton's interpreter.", rich_help_panel=STEPS_PANEL)
    ] = False,
) -> None:
    """Measure the kernels for GPUs: the same bits in every batch, the time of a step, and cost models."""
    with errors_shown():
        plan = TINY_PLAN
        kinds = some_of("--steps", steps, KINDS)
        if tiny:
            os.environ["TRITON_INTERPRET"] = "1"  # read when a step loads Triton
        else:
            plan = GpuPlan(
                some_of("--models", models, MODELS), some_of("--formats", formats, FORMS),
                some_of("--calibrated", calibrated, [*MODELS, "qwen3-32b"]) if words(calibrated) else [], layers,
                8, -(-positions // 8), texts, 64, whole_numbers("--sessions", sessions, 1, 4096), context, 2048,
                repetitions, 2048, 328,
            )  # fmt: skip
        plan = replace(plan, arms=tuple(arm.name for arm in arms_of(arms)))
        folder = to or state_folder() / "results"
        seconds = 60 * minutes * (INTERPRETER_SLOWNESS if tiny else 1.0)
        measure(plan, kinds, seconds, folder, _gpu_facts(tiny))


def measure(plan: GpuPlan, kinds: list[str], seconds: float, folder: Path, gpu: dict[str, Any]) -> None:
    """Run the steps, and keep the results after each one. Raises typer.Exit if a bit differs or a step fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the steps too
    name = "gpu-tiny" if plan.tiny else "gpu"
    console = terminal()
    runner = StepRunner(plan, folder / name, seconds, beside=max(1, (os.cpu_count() or 1) // 2))
    outcomes: list[StepOutcome] = []
    facts = machine() | gpu | {"layers": plan.layers, "context": plan.context}
    for outcome in runner.run(steps_of(plan, kinds)):
        outcomes.append(outcome)
        console.print(f"{outcome.name}: {outcome.outcome}, {outcome.seconds:.0f} s {outcome.reason}", soft_wrap=True)
        write_record(name, _record(outcomes, facts, plan), folder)
    rows = _rows(outcomes)
    for kind, (title, columns) in TABLES.items():
        if rows[kind]:
            console.print(table(title, columns, rows[kind]))
    console.print(table("Steps", STEP_COLUMNS[:-1], [row[:-1] for row in _steps(outcomes)]))
    for note in verdicts(rows, outcomes, tiny=plan.tiny):
        console.print(note, highlight=False, soft_wrap=True)
    written(console, folder / f"{name}.json")
    differing = any(row[-1] for row in rows["exactness"]) or any(row[-1] or row[-2] for row in rows["texts"])
    if differing or any(outcome.outcome == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _record(outcomes: list[StepOutcome], facts: dict[str, Any], plan: GpuPlan) -> dict[str, Any]:
    rows = _rows(outcomes)
    return {
        "title": "Kernels for GPUs",
        "facts": facts,
        **{kind: records(columns, rows[kind]) for kind, (_, columns) in TABLES.items()},
        "steps": records(STEP_COLUMNS, _steps(outcomes)),
        "notes": verdicts(rows, outcomes, tiny=plan.tiny),
    }


def _rows(outcomes: list[StepOutcome]) -> dict[str, list[list[Any]]]:
    found: dict[str, list[list[Any]]] = {kind: [] for kind in TABLES}
    for outcome in outcomes:
        for row in outcome.rows:
            found[row["table"]].append(row["values"])
    return found


def _steps(outcomes: list[StepOutcome]) -> list[list[Any]]:
    return [[one.name, one.outcome, one.seconds, len(one.rows), one.reason] for one in outcomes]


def _gpu_facts(tiny: bool) -> dict[str, Any]:
    """Return the facts about the GPU. Raises EngineError without one, or without Triton."""
    try:
        import torch
        import triton
    except ImportError as error:
        raise EngineError(
            f"the kernels for GPUs need torch and Triton ({error}). torch's CUDA build includes it; without a GPU, "
            "`make test-gpu` installs it"
        ) from error
    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "gpu": "none (interpreter)"}
    if tiny:
        return found
    if not torch.cuda.is_available() or torch.version.hip:
        raise EngineError(
            f"there is no NVIDIA GPU that torch can use here, so nothing was measured. Not run: {LACKING}. `--tiny` "
            "tries the program on the CPU, in Triton's interpreter"
        )
    properties = torch.cuda.get_device_properties(0)
    return found | {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}


if __name__ == "__main__":
    run_program(main, "wisp bench gpu")
