"""`wisp draft`: training a draft model for a target, and finding out how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.tools.cli.terminal import errors_shown, out, require

if TYPE_CHECKING:
    from services.tools.training.run import TrainingRun

app = typer.Typer(help="Draft models that read the target's hidden states.", no_args_is_help=True)

Target = Annotated[str | None, typer.Option(help="Packaged model's name, or a model's folder. \\[env: WISP_TARGET]")]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="TOML file of settings; see `wisp draft settings`.", exists=True)
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Folder of the run. \\[default: .wisp/training/TARGET]")]


@app.command()
def settings() -> None:
    """Print every setting of a training run with its default, as a file to start from."""
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
) -> None:
    """Train a draft: prompts, the target's answers, training, evaluation. Goes on where it was stopped.

    Takes hours on a few cores and gigabytes in the run's folder. The draft is then used with --hidden-draft FOLDER.
    """
    with errors_shown():
        require("model", "training")
        from services.tools.cli.draft_stages import train_draft

        train_draft(_run(target, settings, run), to)


@app.command()
def evaluate(
    draft: Annotated[Path | None, typer.Option(help="The draft's folder. \\[default: the shipped one]")] = None,
    target: Target = None,
    settings: SettingsFile = None,
    run: RunFolder = None,
    record: Annotated[
        Path | None, typer.Option(help="Write rounds for `wisp controller train` here, and evaluate nothing.")
    ] = None,
) -> None:
    """Draft for texts of prompts never trained on, and say how much of it the target accepts.

    The texts are generated once, in the run's folder.
    """
    with errors_shown():
        require("model")
        from services.tools.cli.draft_stages import evaluate_draft, record_rounds

        chosen = _run(target, settings, run)
        if record is not None:
            record_rounds(chosen, draft, record)
        else:
            evaluate_draft(chosen, draft)


def _run(target: str | None, settings: Path | None, folder: Path | None) -> TrainingRun:
    from services.tools.local.folder import state_folder
    from services.tools.local.progress import ConsoleProgress
    from services.tools.local.settings import LocalSettings
    from services.tools.local.target import prepare_target
    from services.tools.training.config import Config
    from services.tools.training.run import TrainingRun
    from shared.models.folder import ModelFolder

    config = Config.read(settings) if settings else Config.model_validate({})
    model = ModelFolder(prepare_target(target or LocalSettings().target, ConsoleProgress(out)))
    return TrainingRun(config, model, folder or state_folder() / "training" / model.name)
