"""The draft sources by name: the choices of `draft_source`, `--draft-source` and a request's `wisp.draft`.

To add a source, implement `DraftSource` and add it to `SOURCES`. The gateway imports this module for the names, so it
loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from services.drafter.core.draft import DraftSource, NoDrafts
from services.drafter.core.lookup import LOOKUP, LookupDrafts
from services.drafter.hidden.card import CONTROLLER, SHIPPED, HiddenDraftFolder, shipped_for
from shared.errors import ModelError
from shared.models.folder import ModelFolder
from shared.runtime import logging
from shared.twin.layout import TRACE, is_twin

if TYPE_CHECKING:
    from services.drafter.control import ControlWeights
    from services.drafter.hidden.engine import DraftEngine
    from services.drafter.learning.supervisor import DraftLearning
    from services.drafter.settings import DraftSettings
    from services.drafter.sources.hidden import HiddenDrafts

AUTO = "auto"
"""The choice that leaves the source to the drafter: the first of `PREFERRED` that is available."""
NONE = "none"
"""The source that never drafts."""
FALLBACK = "lookup"
"""The source that needs no model and fits any vocabulary."""
PREFERRED = ("combined", "hidden", FALLBACK)
MODEL, HIDDEN = "model", "hidden"


@dataclass(frozen=True)
class LoadedSource:
    """A draft source that is ready to draft."""

    source: DraftSource
    vocab_fingerprint: str | None = None
    """Vocabulary that it was made for; None fits any."""
    hidden_size: int = 0
    """Size of the hidden states that it reads."""
    context: int = 0
    """The target's context in tokens, if it reads hidden states."""
    controller: Path | ControlWeights | None = None
    """Weights of the speculation controller that ship with it, or their file."""
    learning: DraftLearning | None = None
    """Its learning, if the settings ask for it."""


Load = Callable[["DraftSettings", Mapping[str, LoadedSource]], LoadedSource | None]


@dataclass(frozen=True)
class SourceKind:
    """A draft source that settings and requests can choose."""

    token_sources: tuple[str, ...]
    """Values of `DraftToken.source` in its drafts; the controller measures and calibrates each."""
    load: Load
    """Loads it, given the sources before it in `SOURCES`; None if the settings do not ask for it. Raises ModelError."""
    required: Callable[[DraftSettings], bool] = lambda settings: False
    """Returns whether the settings demand it: a drafter that cannot load it then refuses to start."""
    needs_torch: bool = False
    reads_hidden_states: bool = False


def load_sources(settings: DraftSettings) -> dict[str, LoadedSource]:
    """Load the sources that the settings ask for, and those that cost nothing. Raises ModelError."""
    torch_missing = importlib.util.find_spec("torch") is None
    loaded: dict[str, LoadedSource] = {}
    for name, kind in SOURCES.items():
        if kind.needs_torch and torch_missing and not is_twin(settings.target):
            if kind.required(settings):
                raise ModelError(f"the draft source {name!r} needs torch: pip install 'wisp[model]'")
        elif (source := kind.load(settings, loaded)) is not None:
            loaded[name] = source
    return loaded


def _requires_hidden(settings: DraftSettings) -> bool:
    return settings.hidden_draft is not None or settings.draft_source in ("hidden", "combined")


def _load_hidden(settings: DraftSettings, loaded: Mapping[str, LoadedSource]) -> LoadedSource | None:
    if is_twin(settings.target):
        return _load_twin(settings)
    folder = _hidden_draft(settings)
    if folder is None:
        return None
    from services.drafter.hidden.engine import DraftEngine
    from services.drafter.sources.hidden import HiddenDrafts

    target = ModelFolder(settings.target)
    engine = DraftEngine(
        folder,
        target,
        dtype=settings.draft_dtype,
        torch_device=settings.device,
        threads=settings.threads,
        budget_tokens=settings.cache_tokens,
    )
    return LoadedSource(
        HiddenDrafts(engine),
        vocab_fingerprint=folder.card.vocab_fingerprint,
        hidden_size=folder.card.model.layer.hidden_size,
        context=target.max_len,
        controller=folder.controller,
        learning=_learning(settings, folder, engine) if settings.draft_learning else None,
    )


def _learning(settings: DraftSettings, folder: HiddenDraftFolder, engine: DraftEngine) -> DraftLearning:
    """Return the learning of a draft. Raises ModelError or SettingsError if it cannot work here."""
    from services.drafter.learning.reports import LearningOptions
    from services.drafter.learning.supervisor import DraftLearning, LearningSetup

    options = LearningOptions(buffer_tokens=settings.draft_learning_tokens)
    setup = LearningSetup(folder, settings.target, engine.hidden_size, options, settings.draft_learning_folder)
    setup.check()
    return DraftLearning(setup, engine.replace)


def _load_twin(settings: DraftSettings) -> LoadedSource | None:
    """Load the drafts of a twin. An emulated device takes the time of their steps."""
    if settings.draft_source not in (AUTO, HIDDEN, "combined"):
        return None
    from services.drafter.core.synthetic import WEIGHTS
    from services.drafter.sources.twin import TraceDrafts, TwinDraftEngine, TwinDrafts
    from shared.twin.folder import TwinFolder
    from shared.twin.text import SyntheticText

    twin = TwinFolder.open(settings.target)
    step_ms = 0.0 if getattr(settings, "device_profile", "") else twin.spec.draft_step_ms
    engine = TwinDraftEngine(settings.cache_tokens, step_ms)
    controller: Path | ControlWeights | None = WEIGHTS
    if twin.trace is not None:
        source: HiddenDrafts = TraceDrafts(engine, twin.trace)
        shipped = SHIPPED / str(twin.trace.facts.get("draft")) / CONTROLLER
        controller = shipped if shipped.is_file() else None
    else:
        source = TwinDrafts(engine, twin.spec.acceptance, SyntheticText(twin.spec))
    return LoadedSource(
        source,
        hidden_size=engine.hidden_size,
        context=ModelFolder(settings.target).max_len,
        controller=controller,
    )


def _load_combined(settings: DraftSettings, loaded: Mapping[str, LoadedSource]) -> LoadedSource | None:
    """Return the source `hidden`, which copies too where a request allows both.

    Raises ModelError for a twin that answers with random words.
    """
    if not is_twin(settings.target) or (settings.target / TRACE).is_file():
        return loaded.get("hidden")
    if settings.draft_source == "combined":
        raise ModelError("random words repeat nothing that could be copied; choose draft source hidden or auto")
    return None


def _hidden_draft(settings: DraftSettings) -> HiddenDraftFolder | None:
    """Return the folder of the hidden-state draft to load, if one is wanted and available."""
    required = _requires_hidden(settings)
    if not required and settings.draft_source != AUTO:
        return None
    if settings.hidden_draft is not None:
        return HiddenDraftFolder.open(settings.hidden_draft)
    try:
        found = shipped_for(ModelFolder(settings.target))
    except ModelError as error:
        if required:
            raise
        logging.get().warning("no hidden-state draft; drafting by lookup", error=str(error))
        return None
    if found is None and required:
        raise ModelError(
            f"no hidden-state draft is shipped for {settings.target}; train one with `wisp draft train` and name its "
            "folder (WISP_HIDDEN_DRAFT), or choose draft source lookup"
        )
    return found


def _load_model(settings: DraftSettings, loaded: Mapping[str, LoadedSource]) -> LoadedSource | None:
    if settings.draft_model is None:
        return None
    from services.drafter.sources.model import ModelDrafts
    from shared.engine import Engine

    folder = ModelFolder(settings.draft_model)
    target = _other_vocabulary(folder, settings.target)
    engine = Engine(
        settings.draft_model,
        dtype=settings.draft_dtype,
        device=settings.device,
        threads=settings.threads,
        budget_tokens=settings.cache_tokens,
    )
    if target is None:
        return LoadedSource(ModelDrafts(engine), vocab_fingerprint=folder.vocab_fingerprint)
    from services.drafter.sources.pairing import translation
    from services.drafter.sources.translated import TranslatedDrafts

    drafts = TranslatedDrafts(engine, translation(folder, target))
    return LoadedSource(drafts, vocab_fingerprint=target.vocab_fingerprint)


def _other_vocabulary(draft: ModelFolder, target_path: Path) -> ModelFolder | None:
    """Return the target's folder if its vocabulary is not the draft model's.

    None too if there is no such folder; each request then shows its target's vocabulary. Raises ModelError if the two
    have too little in common.
    """
    from services.drafter.sources.pairing import covered

    if not target_path.is_dir():
        return None
    target = ModelFolder(target_path)
    if (share := covered(draft, target)) is None:
        return None
    logging.get().info(
        "the draft model has another vocabulary; its tokens are read as the target's", covered=round(share, 3)
    )
    return target


SOURCES: Mapping[str, SourceKind] = {
    NONE: SourceKind((), lambda settings, loaded: LoadedSource(NoDrafts())),
    "lookup": SourceKind((LOOKUP,), lambda settings, loaded: LoadedSource(LookupDrafts())),
    "model": SourceKind(
        (MODEL,), _load_model, required=lambda settings: settings.draft_model is not None, needs_torch=True
    ),
    "hidden": SourceKind(
        (HIDDEN,), _load_hidden, required=_requires_hidden, needs_torch=True, reads_hidden_states=True
    ),
    "combined": SourceKind(
        (HIDDEN, LOOKUP),
        _load_combined,
        needs_torch=True,
        reads_hidden_states=True,
    ),
}
CHOICES = (AUTO, *SOURCES)
if TYPE_CHECKING:
    SourceChoiceName = str
else:
    # A Literal, so that settings accept these names only and list them in `--help`.
    SourceChoiceName = Literal[tuple(sorted(CHOICES))]
