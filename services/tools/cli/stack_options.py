"""Options of the commands that start a stack, and the stack that they describe. Loads nothing slow at import."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from services.tools.cli.program import ProgramCommand
from services.tools.cli.shared_options import MODEL_PANEL
from services.tools.cli.terminal import out
from shared.errors import SettingsError

if TYPE_CHECKING:
    from services.tools.local.stack import Stack


class Dtype(StrEnum):
    """Formats of the target's weights."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    INT8 = "int8"
    GGUF = "gguf"


class ServingChoice(StrEnum):
    """The suite, or a baseline that it is measured against."""

    WISP = "wisp"
    CENTRALIZED = "centralized"
    COLOCATED = "colocated"


def draft_sources() -> list[str]:
    """Return the names that `--draft` accepts: the sources that a request may choose."""
    from services.drafter.sources.registry import SOURCES

    return sorted(SOURCES)


def _known_draft_source(name: str | None) -> str | None:
    if name is not None and name not in draft_sources():
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(draft_sources())}")
    return name


class StackCommand(ProgramCommand):
    """A command with `--draft`. Its `--help` looks the choices up, so that no other command loads them."""

    def format_help(self, *arguments: Any) -> None:
        """Write the help with the draft sources as choices."""
        for parameter in self.params:
            if parameter.name == "draft":
                parameter.metavar = f"<{'|'.join(draft_sources())}>"
        super().format_help(*arguments)


API_PANEL = "API"
PROCESSES_PANEL = "Processes"
DRAFTS_PANEL = "Drafts"
TWIN_PANEL = "Emulated hardware"

DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Format of the target's weights. \\[default: auto: gguf for a GGUF file, whose blocks it keeps; else "
        "bfloat16]",
        rich_help_panel=MODEL_PANEL,
    ),
]
DraftersOption = Annotated[
    int, typer.Option("--drafters", min=1, help="Drafter processes.", rich_help_panel=PROCESSES_PANEL)
]
ServedDraftersOption = Annotated[
    int,
    typer.Option(
        "--drafters",
        min=0,
        help="Drafter processes; with 0, sessions are decoded without drafts.",
        rich_help_panel=PROCESSES_PANEL,
    ),
]
VerifiersOption = Annotated[
    int,
    typer.Option(
        "--verifiers", min=1, help="Verifier processes; they share the cores.", rich_help_panel=PROCESSES_PANEL
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads of each verifier, or of the baseline. \\[default: its share of the cores]",
        rich_help_panel=PROCESSES_PANEL,
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        callback=_known_draft_source,
        help="Draft source. \\[default: combined if there is a draft model for the target, else lookup]",
        rich_help_panel=DRAFTS_PANEL,
    ),
]
DraftModelOption = Annotated[
    Path | None,
    typer.Option("--draft-model", help="Folder of a draft model, for --draft model.", rich_help_panel=DRAFTS_PANEL),
]
HiddenDraftOption = Annotated[
    Path | None,
    typer.Option(
        "--hidden-draft",
        help="Folder written by `wisp draft train`. \\[default: the draft shipped with WISP]",
        rich_help_panel=DRAFTS_PANEL,
    ),
]
TargetProfileOption = Annotated[
    str | None,
    typer.Option(
        "--target-profile",
        help="Serve the twin of a target on hardware that is not here: a shipped profile, such as a100-qwen3-32b, or "
        "a file of `wisp calibrate`. Answers are random words, or those of --trace.",
        rich_help_panel=TWIN_PANEL,
    ),
]
TraceOption = Annotated[
    str | None,
    typer.Option(
        "--trace",
        help="Trace of --target-profile: a shipped name, or a file of `wisp trace record`.",
        rich_help_panel=TWIN_PANEL,
    ),
]
ServingOption = Annotated[
    ServingChoice,
    typer.Option(
        "--serving",
        help="wisp: the suite. Baselines without brokers, in one process: centralized decodes plainly, colocated "
        "drafts beside the target.",
        rich_help_panel=PROCESSES_PANEL,
    ),
]


def _refuse_parts(
    serving: ServingChoice,
    drafters: int,
    verifiers: int,
    draft: str | None,
    draft_model: Path | None,
    hidden_draft: Path | None,
) -> None:
    """Raise SettingsError for options of drafts or processes that miss another one or do not fit the way of serving."""
    if draft == "model" and draft_model is None:
        raise SettingsError("--draft model needs the folder of a draft model: --draft-model FOLDER")
    if serving is not ServingChoice.WISP and (drafters, verifiers) != (1, 1):
        raise SettingsError(f"--serving {serving.value} runs one engine: leave --drafters and --verifiers out")
    if serving is ServingChoice.CENTRALIZED and (draft or draft_model or hidden_draft):
        raise SettingsError("--serving centralized never drafts: leave --draft, --draft-model and --hidden-draft out")


def stack_for(
    purpose: str,
    target: str | None,
    dtype: Dtype | None,
    draft: str | None,
    draft_model: Path | None,
    hidden_draft: Path | None,
    threads: int | None,
    *,
    drafters: int = 1,
    verifiers: int = 1,
    serving: ServingChoice = ServingChoice.WISP,
    host: str = "127.0.0.1",
    port: int = 0,
    api_keys: Path | None = None,
    target_profile: str | None = None,
    trace: str | None = None,
    console: Console = out,
) -> Stack:
    """Prepare the models and return the stack that the options describe, not started. Raises WispError.

    target_profile: serve its twin, with the tokenizer of `target` and the texts of `trace`. console: shows the
    progress.
    """
    from services.tools.local.progress import ConsoleProgress
    from services.tools.local.settings import LocalSettings
    from services.tools.local.stack import Stack
    from services.tools.local.target import prepare_target, prepare_twin, refuse_bad_sampling

    _refuse_parts(serving, drafters, verifiers, draft, draft_model, hidden_draft)
    if trace and not target_profile:
        raise SettingsError("--trace needs the emulated hardware: --target-profile NAME")
    progress = ConsoleProgress(console)
    given = {
        "WISP_DTYPE": dtype and dtype.value,
        "WISP_DRAFT_SOURCE": draft,
        "WISP_DRAFT_MODEL": draft_model and prepare_target(str(draft_model), progress),
        "WISP_HIDDEN_DRAFT": hidden_draft and hidden_draft.absolute(),
        "WISP_THREADS": threads,
        "WISP_API_KEYS_FILE": api_keys,
    }
    stack = Stack(
        purpose,
        drafters=drafters,
        verifiers=verifiers,
        serving=serving.value,
        env={key: str(value) for key, value in given.items() if value},
        host=host,
        port=port,
        progress=progress,
    )
    stack.refuse_bad_settings(target_known=False)  # so that nobody waits for a target in vain
    wanted = target or LocalSettings().target
    if target_profile:
        stack.target = prepare_twin(target_profile, wanted, progress, trace=trace)
    else:
        stack.target = prepare_target(wanted, progress).absolute()
    refuse_bad_sampling(stack.target)
    return stack
