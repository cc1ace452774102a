"""Commands that hand their arguments to another program: benchmarks, chaos, simulator, calibration and device."""

from __future__ import annotations

import ast
import os
import sys
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from services.tools.cli.program import Program, ProgramCommand
from services.tools.cli.terminal import errors_shown, out, require
from shared.errors import quoted


class BenchCommand(ProgramCommand):
    """`wisp bench`. Its `--help` has a line for each benchmark, the first of the program's docstring.

    All that follows a benchmark's name belongs to the benchmark, `--help` too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave what follows the name to the benchmark."""
        name, *rest = args or [""]
        if name in list(Benchmark) and rest[:1] != ["--"]:
            args = [name, "--", *rest]
        return super().parse_args(ctx, args)

    def format_help(self, *arguments: Any) -> None:
        """Write the help, and the list of the benchmarks below it."""
        super().format_help(*arguments)
        table = Table(title="Benchmarks", title_justify="left", box=None, show_header=False, padding=(0, 1))
        for benchmark in Benchmark:
            table.add_row(Text(benchmark.value, "cyan"), Text(benchmark.summary))
        out.print(table)


class Benchmark(StrEnum):
    """The benchmarks: each is a program `services.tools.bench.<name>`."""

    DRAFT = "draft"
    EDITS = "edits"
    ENGINE = "engine"
    ESTIMATOR = "estimator"
    FORMATS = "formats"
    GATEWAY = "gateway"
    GPU = "gpu"
    GRAMMAR = "grammar"
    HANDOFF = "handoff"
    LEARNING = "learning"
    LOAD = "load"
    ROUNDS = "rounds"
    SCALING = "scaling"
    SCHEDULER = "scheduler"
    STREAM = "stream"
    TWIN = "twin"
    VOCABULARY = "vocabulary"

    @property
    def summary(self) -> str:
        """First line of the program's docstring, without its name. The program is not imported."""
        folder = Path(__file__).parents[1] / "bench"
        module = folder / f"{self.value}.py"
        source = module if module.is_file() else folder / self.value / "__main__.py"
        docstring = ast.get_docstring(ast.parse(source.read_text("utf-8"))) or ""
        return docstring.partition("\n")[0].partition(": ")[2]


def _known_benchmark(name: str) -> str:
    if name not in list(Benchmark):
        nearest = get_close_matches(name, list(Benchmark), 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(Benchmark)}"
        raise typer.BadParameter(f"there is no benchmark {quoted(name)}; {hint}")
    return name


BENCHMARK_EXTRAS = {
    Benchmark.DRAFT: ("model", "training", "bench"),
    Benchmark.GATEWAY: ("gateway", "model"),
    Benchmark.HANDOFF: ("gateway", "model", "client"),
    Benchmark.LEARNING: ("model", "training"),
    Benchmark.LOAD: ("gateway", "model", "client", "bench"),
    Benchmark.ROUNDS: ("gateway", "model", "client"),
    Benchmark.SCALING: ("gateway", "model", "client"),
    Benchmark.STREAM: ("gateway", "model", "client"),
    Benchmark.TWIN: ("gateway", "model", "client", "bench", "simulator"),
    Benchmark.VOCABULARY: ("model", "training"),
}
"""Extras that a benchmark needs; the others need `model`."""
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of commands that leave their arguments to another program."""


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(callback=_known_benchmark, help="A benchmark of the list below.")],
) -> None:
    """Run a benchmark with its own options: `wisp bench stream --help` lists them."""
    with errors_shown():
        require(*BENCHMARK_EXTRAS.get(Benchmark(name), ("model",)))
        _replace_by(f"services.tools.bench.{name}", context)


def chaos(context: typer.Context) -> None:
    """Make services, brokers and links fail under load and check every token (`wisp chaos --help`)."""
    with errors_shown():
        require("gateway", "model", "client")
        _replace_by("services.tools.chaos", context)


def simulate(context: typer.Context) -> None:
    """Simulate a fleet on big accelerators in virtual time (`wisp simulate --help`)."""
    with errors_shown():
        require("simulator")
        _replace_by("services.tools.simulator", context)


def calibrate(context: typer.Context) -> None:
    """Measure the times of an architecture on this machine, for simulations and twins (`wisp calibrate --help`)."""
    with errors_shown():
        require("model")
        _replace_by("services.tools.twin.calibrate", context)


def device(context: typer.Context) -> None:
    """Join a cluster from outside: serve the API on loopback and draft on this device (`wisp device --help`)."""
    with errors_shown():
        require("gateway", "device")
        _replace_by("services.device", context)


def _replace_by(module: str, context: typer.Context) -> None:
    """Replace this process by a program that parses the remaining arguments."""
    os.execv(sys.executable, [sys.executable, "-m", module, *context.args])


def add_to(app: Program) -> None:
    """Add these commands to the command line."""
    app.command(cls=BenchCommand, context_settings=PASSED_ON)(bench)
    for command in (chaos, simulate, calibrate):
        app.command(context_settings=PASSED_ON, add_help_option=False)(command)
    app.command(context_settings={**PASSED_ON, "help_option_names": []})(device)
