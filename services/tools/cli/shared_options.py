"""Options that several commands and programs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_PANEL = "Model"
SUITE_PANEL = "Suite"
RECORDING_PANEL = "Recording"
MODEL_FORMS = "Packaged model's name, a model's folder, or a GGUF file."

TargetOption = Annotated[
    str | None, typer.Option("--target", help=f"{MODEL_FORMS} \\[env: WISP_TARGET]", rich_help_panel=MODEL_PANEL)
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        help="The suite's prefix. \\[env: WISP_NAMESPACE; default: the suite running here]",
        rich_help_panel=SUITE_PANEL,
    ),
]
AmqpUrlOption = Annotated[
    str | None,
    typer.Option(
        "--amqp-url",
        help="The suite's RabbitMQ. \\[env: WISP_AMQP_URL; default: the suite running here]",
        rich_help_panel=SUITE_PANEL,
    ),
]
RecordingFileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="A file by `wisp journal export` in place of the live journal.",
        rich_help_panel=RECORDING_PANEL,
    ),
]
