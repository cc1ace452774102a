"""Command-line options that several benchmarks share, and parsers of their comma-separated values."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import typer

from services.tools.cli.program import Program
from services.tools.cli.shared_options import MODEL_FORMS, MODEL_PANEL
from services.tools.local.progress import Progress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from shared.errors import SettingsError

RESULTS_PANEL = "Results"

ModelOption = Annotated[str, typer.Option(help=MODEL_FORMS)]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Format of the target's weights: auto, bfloat16, float32, int8 or gguf.", rich_help_panel=MODEL_PANEL
    ),
]
TargetFolderOption = Annotated[
    Path | None, typer.Option(help="Folder of the target. \\[default: the default target's]", show_default=False)
]
NameOption = Annotated[
    str, typer.Option(help="Name of the result files in .wisp/results.", rich_help_panel=RESULTS_PANEL)
]
StreamsOption = Annotated[int, typer.Option(min=1, help="Streams at a time.")]
EngineThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")]


def run_program(main: Callable[..., None], name: str) -> None:
    """Run the program with the command line's arguments. name: as users type it, for the usage line."""
    program = Program()
    program.command()(main)
    program(prog_name=name)


def target_folder(target: str | None, progress: Progress) -> Path:
    """Return the folder of `--target`, or of the default target without one. Raises ModelError."""
    return prepare_target(target or LocalSettings().target, progress)


def let_idle_threads_sleep() -> None:
    """Keep idle OpenMP threads from spinning on cores that services need. Call it before torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def words(text: str) -> list[str]:
    """Return the words of a comma-separated list in order, without duplicates."""
    return list(dict.fromkeys(word for word in (part.strip() for part in text.split(",")) if word))


def numbers(option: str, text: str, most: float) -> list[float]:
    """Return numbers from 0 to `most`. Raises SettingsError."""
    try:
        found = [float(word) for word in words(text)]
    except ValueError:
        found = []
    if not found or not all(0 <= number <= most for number in found):
        raise SettingsError(f"{option} takes numbers from 0 to {most:g} with commas between them (given: {text!r})")
    return found


def whole_numbers(option: str, text: str, least: int, most: int | None = None) -> list[int]:
    """Return whole numbers from `least` to `most`. An empty text gives none. Raises SettingsError."""
    found = words(text)
    if not all(word.isdecimal() and least <= int(word) <= (most or int(word)) for word in found):
        allowed = f"from {least} to {most}" if most else f"from {least} on"
        raise SettingsError(f"{option} takes whole numbers {allowed}, with commas between them (given: {text!r})")
    return list(dict.fromkeys(int(word) for word in found))


def some_of(option: str, text: str, known: Collection[str]) -> list[str]:
    """Return words that must all be among `known`, at least one. Raises SettingsError."""
    found = words(text)
    if not found or not set(found) <= set(known):
        raise SettingsError(f"{option} takes some of {', '.join(known)}, with commas between them (given: {text!r})")
    return found
