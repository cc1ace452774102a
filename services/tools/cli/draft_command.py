"""`wisp draft`: trains and evaluates draft models that read the target's hidden states."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.tools.cli.program import Program
from services.tools.cli.terminal import errors_shown, out, require, stopped_by_signals
from shared.errors import SettingsError

if TYPE_CHECKING:
    from services.tools.training.run import TrainingRun

app = Program(help="Train and evaluate draft models that read the target's hidden states.", no_args_is_help=True)

Target = Annotated[str | None, typer.Option(help="Packaged model's name, or a model's folder. \\[env: WISP_TARGET]")]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="TOML file of settings (`wisp draft settings`).", exists=True)
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Folder of the run. \\[default: .wisp/training/TARGET]")]


@app.command()
def settings() -> None:
    """Print the settings of a training run with their defaults, as a TOML file to start from."""
    with errors_shown():
        require("model")
        from services.tools.training.config import Config

        out.print(Config.model_validate({}).as_toml(), markup=False, soft_wrap=True)


@app.command()
def train(
    to: Annotated[Path, typer.Option("--out", help="Folder to write the draft to.")],
    target: Target = None,
    settings: SettingsFile = None,
    run: RunFolder = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Draft to train further; needs --run. \\[default: start anew]", exists=True),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Stop after this time; the same command goes on. \\[default: never]")
    ] = None,
    carry: Annotated[
        Path | None,
        typer.Option(help="Folder of pieces under 16 MB with which an empty machine goes on with this run."),
    ] = None,
) -> None:
    """Train a draft: prompts, the target's answers, training, evaluation. A stopped run continues where it stopped.

    Needs hours on a few cores and gigabytes in the run's folder. `wisp up --hidden-draft FOLDER` then uses the draft.
    """
    with errors_shown():
        if start is not None and run is None:
            raise SettingsError(
                "--from needs a folder of its own for the run, since the default one may hold another draft's "
                "training: add --run FOLDER"
            )
        require("model", "training")
        from services.tools.cli.draft_stages import train_draft

        with stopped_by_signals():
            train_draft(_run(target, settings, run, start, minutes), to, carry)


@app.command()
def evaluate(
    draft: Annotated[
        Path | None, typer.Option(help="The draft's folder. \\[default: the draft shipped with WISP]")
    ] = None,
    target: Target = None,
    settings: SettingsFile = None,
    run: RunFolder = None,
    record: Annotated[
        Path | None, typer.Option(help="Write rounds for `wisp controller train` to this file instead of evaluating.")
    ] = None,
    final: Annotated[
        bool, typer.Option("--final", help="Draft for the final prompts, which may not decide anything about a draft.")
    ] = False,
) -> None:
    """Draft for held-out prompts and print how much the target accepts.

    The completions are generated once, in the run's folder.
    """
    with errors_shown():
        if final and record is not None:
            raise SettingsError("rounds of the final prompts may not train a controller: leave out --final or --record")
        require("model")
        from services.tools.cli.draft_stages import evaluate_draft, record_rounds

        chosen = _run(target, settings, run)
        if record is not None:
            record_rounds(chosen, draft, record)
        else:
            evaluate_draft(chosen, draft, final=final)


def _run(
    target: str | None,
    settings: Path | None,
    folder: Path | None,
    start: Path | None = None,
    minutes: float | None = None,
) -> TrainingRun:
    until_s = math.inf if minutes is None else time.monotonic() + 60 * minutes
    from services.drafter.hidden.card import HiddenDraftFolder
    from services.tools.local.folder import state_folder
    from services.tools.local.progress import ConsoleProgress
    from services.tools.local.settings import LocalSettings
    from services.tools.local.target import prepare_target
    from services.tools.training.config import Config
    from services.tools.training.run import TrainingRun
    from shared.models.folder import ModelFolder

    config = Config.read(settings) if settings else Config.model_validate({})
    model = ModelFolder(prepare_target(target or LocalSettings().target, ConsoleProgress(out)))
    return TrainingRun(
        config,
        model,
        folder or state_folder() / "training" / model.name,
        None if start is None else HiddenDraftFolder.open(start),
        until_s,
    )
