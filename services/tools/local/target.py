"""Prepares the folders of target models and twins, and lists models."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from services.tools.local.folder import state_folder
from services.tools.local.progress import Progress, ProgressStep
from services.tools.local.settings import LocalSettings


def models_folder() -> Path:
    """Return the folder of unpacked packaged models."""
    return state_folder() / "models"


def prepare_target(target: str, progress: Progress) -> Path:
    """Return the complete, checked folder of a packaged model or of the model in a folder. Raises ModelError.

    Shows progress only if there is work to do.
    """
    from shared.models.prepare import prepare
    from shared.twin.folder import TwinFolder
    from shared.twin.layout import is_twin

    if is_twin(Path(target)):
        return TwinFolder.open(Path(target)).path.absolute()
    with ExitStack() as shown:
        step: ProgressStep | None = None

        def show(doing: str, share: float) -> None:
            nonlocal step
            if step is None:
                step = shown.enter_context(progress.step(f"preparing the model {target}"))
                step.done(f"model {target} prepared")
            step.detail(f"{doing} {share:.0%}" if share else doing)

        return prepare(target, models_folder(), show).absolute()


def prepare_twin(
    profile: str,
    tokenizer: str,
    progress: Progress,
    acceptance: float | None = None,
    trace: str | None = None,
) -> Path:
    """Return the folder of a target profile's twin, made with the tokenizer of a packaged model or a model's folder.

    acceptance: mean chance of its draft tokens. trace: name or file of a trace, which gives answers and drafts. Raises
    WispError.
    """
    from shared.twin.files import trace_path
    from shared.twin.folder import write_own_twin
    from shared.twin.spec import Acceptance

    given = Acceptance() if acceptance is None else Acceptance(mean=acceptance)
    file = trace_path(trace) if trace else None
    words = prepare_target(tokenizer, progress)
    return write_own_twin(profile, words, state_folder() / "twins", given, trace=file).path.absolute()


def refuse_bad_sampling(folder: Path) -> None:
    """Raise ModelError if a gateway would refuse the sampling of the folder's generation_config.json."""
    from shared.models.folder import ModelFolder

    if LocalSettings().generation_config == "auto":
        _ = ModelFolder(folder).sampling


def model_rows() -> list[tuple[str, str, str]]:
    """Return name, state and folder of every model that is packaged or in the models folder."""
    from shared.errors import ModelError
    from shared.models.folder import ModelFolder
    from shared.models.prepare import PACKAGED

    found = {path.name for path in models_folder().glob("[!.]*") if path.is_dir()}
    rows = []
    for name in sorted(found | set(PACKAGED)):
        folder = models_folder() / name
        if name not in found:
            state = "packaged, not unpacked yet (wisp models prepare)"
        else:
            try:
                size = sum(file.stat().st_size for file in ModelFolder(folder).weights)
                state = f"ready, {size / 2**20:,.0f} MiB"
            except ModelError as error:
                state = f"incomplete: {error}"
        rows.append((name, state, str(folder)))
    return rows
