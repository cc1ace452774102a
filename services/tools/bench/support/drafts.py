"""The draft model that a benchmark measures, and the training run whose texts it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.drafter.hidden.card import HiddenDraftFolder, shipped_for
from services.tools.local.folder import state_folder
from services.tools.local.settings import DEFAULT_TARGET
from services.tools.training.config import Config
from services.tools.training.run import TrainingRun
from shared.errors import SettingsError
from shared.models.folder import ModelFolder

DraftFolderOption = Annotated[
    Path | None, typer.Option(help="Folder of a draft. \\[default: the target's shipped one]")
]
RunFolderOption = Annotated[Path | None, typer.Option(help="Folder of the texts. \\[default: .wisp/training/TARGET]")]


def trained_target(target: Path | None) -> ModelFolder:
    """Return the folder of `--target`, or of the default target without one. Raises ModelError."""
    return ModelFolder(target or state_folder() / "models" / DEFAULT_TARGET)


def measured_draft(draft: Path | None, target: ModelFolder) -> HiddenDraftFolder:
    """Return the draft of `--draft`, or the target's shipped one without it. Raises SettingsError if there is none."""
    folder = HiddenDraftFolder.open(draft) if draft else shipped_for(target)
    if folder is None:
        raise SettingsError(f"no draft is shipped for {target.path}; give the folder of one with --draft")
    return folder


def training_run(folder: Path | None, target: ModelFolder) -> TrainingRun:
    """Return the training run in a folder, by default the target's own."""
    return TrainingRun(Config.model_validate({}), target, folder or state_folder() / "training" / target.name)
