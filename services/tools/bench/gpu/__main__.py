"""`wisp bench gpu`: bits of the kernels for GPUs however sessions are computed, and speed against transformers.

Exactness: sessions of a model with random weights are computed in several ways, and the bits of all logits compared
with those of one prefill. Speed: steps of 1 to 256 sessions that decode, verify 5 or 9 tokens, against transformers
with SDPA, and the share of the memory's bandwidth that reading weights and KV reaches.

`--tiny` runs all of it on the CPU in Triton's interpreter, to try the program. Its times mean nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from services.tools.bench.support.options import run_program, some_of, whole_numbers
from services.tools.bench.support.report import conclude, machine, records, table, terminal
from services.tools.cli.terminal import errors_shown
from shared.errors import EngineError

if TYPE_CHECKING:
    import torch

    from shared.gpu_kernels.decoder import GpuDecoder

FORMS = ("bfloat16", "float16", "float32")
MODELS = ("smollm2-135m", "qwen3-8b")
NEW_TOKENS = (1, 5, 9)
"""Tokens of a session in a step: decoding, and verification of 4 and 8 drafts."""
EXACTNESS_COLUMNS = ["model", "format", "way", "positions", "differing"]
SPEED_COLUMNS = [
    "model", "sessions", "new tokens", "step ms", "without graphs ms", "transformers ms", "GB/s", "of copy %"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Sizes of a measurement."""

    models: list[str]
    forms: list[str]
    layers: int
    exact_sessions: int
    exact_length: int
    sessions: list[int]
    context: int
    repetitions: int
    copy_mb: int
    checked: int
    """Tokens of the check at load."""


TINY_PLAN = GpuPlan(["tiny"], ["bfloat16"], 1, 2, 6, [1, 2], 4, 1, 1, 4)


def main(
    models: Annotated[str, typer.Option(help="Shapes of models: smollm2-135m, qwen3-8b.")] = ",".join(MODELS),
    formats: Annotated[str, typer.Option(help="Formats of weights for exactness.")] = ",".join(FORMS),
    layers: Annotated[int, typer.Option(min=1, help="Most layers of a model, for speeds too.")] = 8,
    positions: Annotated[int, typer.Option(min=8, help="Positions for exactness, in each way.")] = 2000,
    sessions: Annotated[str, typer.Option(help="Sessions of a step.")] = "1,8,32,128,256",
    context: Annotated[int, typer.Option(min=16, help="Held tokens of each session.")] = 512,
    repetitions: Annotated[int, typer.Option(min=1, help="Steps of each measurement.")] = 10,
    tiny: Annotated[bool, typer.Option(help="Try everything on the CPU, in Triton's interpreter.")] = False,
) -> None:
    """Measure the kernels for GPUs: the same bits in every batch, and the time of a step."""
    with errors_shown():
        plan = TINY_PLAN
        if tiny:
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is loaded
        else:
            counts = whole_numbers("--sessions", sessions, 1, 4096)
            plan = GpuPlan(
                some_of("--models", models, MODELS), some_of("--formats", formats, FORMS), layers,
                8, -(-positions // 8), counts, context, repetitions, 2048, 328,
            )  # fmt: skip
        torch_device = _torch_device(tiny)
        console = terminal()
        exactness = _exactness(plan, torch_device, console)
        speed = _speed(plan, torch_device, console)
        record = {
            "title": "Kernels for GPUs",
            "facts": machine() | _gpu_facts(torch_device) | {"layers": plan.layers, "context": plan.context},
            "exactness": records(EXACTNESS_COLUMNS, exactness),
            "speed": records(SPEED_COLUMNS, speed),
            "notes": [_verdict(exactness), *(["In Triton's interpreter: the times mean nothing."] if tiny else [])],
        }
        conclude(console, "gpu-tiny" if tiny else "gpu", record)
        if any(row[-1] for row in exactness):
            raise typer.Exit(1)


def _torch_device(tiny: bool) -> torch.device:
    """Return the device to measure. Raises EngineError without a GPU or without Triton."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"the kernels for GPUs need torch and Triton ({error}). torch's CUDA build includes it; without a GPU, "
            "`make test-gpu` installs it"
        ) from error
    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available() or torch.version.hip:
        raise EngineError(
            "there is no NVIDIA GPU that torch can use here, so nothing was measured. `--tiny` tries the program on "
            "the CPU, in Triton's interpreter"
        )
    return torch.device("cuda")


def _exactness(plan: GpuPlan, torch_device: torch.device, console: Console) -> list[list[Any]]:
    from services.tools.bench.gpu.exactness import ExactnessCheck
    from services.tools.bench.gpu.random_models import RandomModel, configuration
    from shared.gpu_kernels.decoder import GpuDecoder

    rows: list[list[Any]] = []
    for name in plan.models:
        model = RandomModel(configuration(name, min(plan.layers, 2)))
        for form in plan.forms:
            blocks = ExactnessCheck.blocks(plan.exact_sessions, plan.exact_length)
            decoder = GpuDecoder(model.description, model.read, form=form, blocks=blocks, torch_device=torch_device)
            _settle(decoder, blocks, plan, torch_device)
            check = ExactnessCheck(decoder, plan.exact_sessions, plan.exact_length)
            rows += [[name, form, one.way, one.positions, one.differing] for one in check.outcomes()]
    console.print(table("Positions with other bits than one prefill has", EXACTNESS_COLUMNS, rows))
    return rows


def _speed(plan: GpuPlan, torch_device: torch.device, console: Console) -> list[list[Any]]:
    import torch

    from services.tools.bench.gpu.random_models import RandomModel, configuration
    from services.tools.bench.gpu.speed import TransformersSteps, copied_gb_s, kernel_step, step_ms
    from shared.gpu_kernels.decoder import GpuDecoder
    from shared.kernels.layout import BLOCK

    rows: list[list[Any]] = []
    copied = copied_gb_s(torch_device, plan.copy_mb)
    for name in plan.models:
        config = configuration(name)
        config["num_hidden_layers"] = min(config["num_hidden_layers"], plan.layers)
        model = RandomModel(config)
        blocks = max(plan.sessions) * -(-(plan.context + max(NEW_TOKENS)) // BLOCK)
        decoder = GpuDecoder(model.description, model.read, form="bfloat16", blocks=blocks, torch_device=torch_device)
        _settle(decoder, blocks, plan, torch_device)
        graphs = decoder.graphs
        rival = TransformersSteps(config, torch.bfloat16, torch_device)
        embedding = config["vocab_size"] * config["hidden_size"]
        held = 2 * decoder.keys[:, :1, :, :1].numel() * plan.context
        for sessions in plan.sessions:
            for new in NEW_TOKENS:
                own = step_ms(kernel_step(decoder, sessions, plan.context, new), torch_device, plan.repetitions)
                decoder.graphs = None
                single = step_ms(kernel_step(decoder, sessions, plan.context, new), torch_device, plan.repetitions)
                decoder.graphs = graphs
                other = step_ms(rival.step(sessions, plan.context, new), torch_device, plan.repetitions)
                rate = 2 * (model.parameters - embedding + held * sessions) / own / 1e6
                rows.append([name, sessions, new, own, single, other, rate, 100 * rate / copied])
    console.print(table(f"Steps in bfloat16, {plan.context} held tokens", SPEED_COLUMNS, rows))
    return rows


def _settle(decoder: GpuDecoder, blocks: int, plan: GpuPlan, torch_device: torch.device) -> None:
    """Choose a decoder's options as the engine does at load."""
    from shared.gpu_kernels.check import settle
    from shared.gpu_kernels.graphs import prepared_graphs

    settle(decoder, blocks, plan.checked, prepared_graphs if torch_device.type == "cuda" else None)


def _gpu_facts(torch_device: torch.device) -> dict[str, Any]:
    import torch
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "gpu": "none (interpreter)"}
    if torch_device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch_device)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return found


def _verdict(rows: list[list[Any]]) -> str:
    positions, differing = sum(row[3] for row in rows), sum(row[4] for row in rows)
    if differing:
        return f"NOT exact here: {differing} of {positions} positions have other bits than one prefill."
    return f"All {positions} positions have the bits of one prefill."


if __name__ == "__main__":
    run_program(main, "wisp bench gpu")
