"""What a drafter can draft with: its sources, which one a request gets, and the controller."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from services.drafter.control import Controller, ControlWeights
from services.drafter.control_files import load_weights
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.hidden.card import HiddenDraftFolder, shipped_for
from services.drafter.settings import DraftSettings
from services.drafter.sources import DraftSource, LookupDrafts, NoDrafts
from shared.errors import ModelError
from shared.messages import DraftChoice, Generate
from shared.models.folder import ModelFolder
from shared.runtime import logging

NAMES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "lookup": ("lookup",),
    "model": ("model",),
    "hidden": ("hidden",),
    "combined": ("hidden", "lookup"),
}
"""What a request may choose, and the sources that its drafts then come from."""


@dataclass(frozen=True)
class Choice:
    """The source that a session gets, and what its guesses may be named."""

    source: DraftSource
    names: tuple[str, ...]

    @property
    def reads_states(self) -> bool:
        """Whether the target's hidden states are of use."""
        return "hidden" in self.names


@dataclass(frozen=True)
class Drafting:
    """Sources by the name that a request chooses; `default` for those that choose none."""

    sources: Mapping[str, DraftSource]
    default: str
    controller: Controller
    vocabularies: Mapping[str, str]
    """Fingerprint of the vocabulary that a source was made for; those that copy fit any."""
    hidden_size: int = 0
    context: int = 0
    """The target's context in tokens, where its hidden states are read."""

    def states(self) -> HiddenRows:
        """Room for the hidden states of a new session."""
        return HiddenRows(self.hidden_size, self.context)

    def choose(self, generate: Generate) -> Choice:
        """What a request asks for, or the nearest that can be had."""
        wanted = self.default if generate.draft is DraftChoice.AUTO else generate.draft.value
        log = logging.get()
        if wanted not in self.sources:
            log.warning("no such draft source here; using the default", wanted=wanted, default=self.default)
            wanted = self.default
        made_for = self.vocabularies.get(wanted)
        if made_for is not None and made_for != generate.vocab_fingerprint:
            log.warning(
                "the draft's vocabulary is not the target's; drafting by lookup",
                draft_vocabulary=made_for,
                target_vocabulary=generate.vocab_fingerprint,
            )
            wanted = "lookup"
        return Choice(self.sources[wanted], NAMES[wanted])


def load_drafting(settings: DraftSettings) -> Drafting:
    """Load what the settings ask for. Raises ModelError or SettingsError."""
    sources: dict[str, DraftSource] = {"none": NoDrafts(), "lookup": LookupDrafts()}
    vocabularies: dict[str, str] = {}
    hidden_size = context = 0
    if settings.draft_model is not None:
        sources["model"] = _load_model(settings)
        vocabularies["model"] = ModelFolder(settings.draft_model).vocab_fingerprint
    folder = _hidden_draft(settings)
    if folder is not None:
        sources["hidden"] = sources["combined"] = _load_hidden(settings, folder)
        vocabularies["hidden"] = vocabularies["combined"] = folder.card.vocab_fingerprint
        hidden_size = folder.card.model.layer.hidden_size
        context = ModelFolder(settings.target).max_len
    default = settings.draft_source
    if default == "auto":
        default = "combined" if folder is not None else "lookup"
    weights = ControlWeights()
    path = settings.controller or (folder.controller if folder else None)
    if path is not None:
        weights = load_weights(path)
    controller = Controller(settings.stop_rule, settings.draft_length, weights)
    return Drafting(sources, default, controller, vocabularies, hidden_size, context)


def _hidden_draft(settings: DraftSettings) -> HiddenDraftFolder | None:
    """The hidden-state draft to use, if one is wanted and to be had."""
    needed = settings.hidden_draft is not None or settings.draft_source in ("combined", "hidden")
    if not needed and settings.draft_source != "auto":
        return None
    if importlib.util.find_spec("torch") is None:
        if needed:
            raise ModelError("a hidden-state draft needs torch: pip install 'wisp[model]'")
        return None
    if settings.hidden_draft is not None:
        return HiddenDraftFolder.open(settings.hidden_draft)
    try:
        target = ModelFolder(settings.target)
        found = shipped_for(target)
    except ModelError as error:
        if needed:
            raise
        logging.get().warning("no hidden-state draft; drafting by lookup", error=str(error))
        return None
    if found is None and needed:
        raise ModelError(
            f"no hidden-state draft is shipped for {settings.target}; train one with `wisp draft train` and name its "
            "folder (WISP_HIDDEN_DRAFT), or choose draft source lookup"
        )
    return found


def _load_hidden(settings: DraftSettings, folder: HiddenDraftFolder) -> DraftSource:
    # torch is needed for models alone; a drafter on a thin device can do without it.
    from services.drafter.hidden.engine import DraftEngine
    from services.drafter.sources.hidden import HiddenDrafts

    return HiddenDrafts(
        DraftEngine(
            folder,
            ModelFolder(settings.target),
            dtype=settings.draft_dtype,
            device=settings.device,
            threads=settings.threads,
            budget_tokens=settings.cache_tokens,
        )
    )


def _load_model(settings: DraftSettings) -> DraftSource:
    from services.drafter.sources.model import ModelDrafts
    from shared.engine import Engine

    assert settings.draft_model is not None
    return ModelDrafts(
        Engine(
            settings.draft_model,
            dtype=settings.draft_dtype,
            device=settings.device,
            threads=settings.threads,
            budget_tokens=settings.cache_tokens,
        )
    )
