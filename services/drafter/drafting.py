"""The draft sources that a drafter has loaded, the choice among them for each request, and the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.drafter.control import Controller, ControlWeights
from services.drafter.control_files import load_weights
from services.drafter.core.draft import DraftSource, NoDrafts
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.lookup import LOOKUP
from services.drafter.settings import DraftSettings
from services.drafter.sources.registry import AUTO, FALLBACK, NONE, PREFERRED, SOURCES, load_sources
from shared.errors import ModelError, WispError
from shared.messages import Generate
from shared.models.folder import ModelFolder
from shared.runtime import logging

if TYPE_CHECKING:
    from services.drafter.learning.supervisor import DraftLearning
    from shared.grammar.masks import Grammars
    from shared.grammar.token_masks import DraftGrammar


@dataclass(frozen=True)
class SourceChoice:
    """The source of one session."""

    source: DraftSource
    token_sources: tuple[str, ...]
    """Values that `DraftToken.source` may have in its drafts."""
    reads_hidden_states: bool
    run_copies: bool
    """True if a verifier may use prompt lookup in the session's runs."""


@dataclass(frozen=True)
class Drafting:
    """Loaded sources by name, and the controller of their drafts."""

    sources: Mapping[str, DraftSource]
    default: str
    """Name of the source for requests that leave the choice to the drafter."""
    controller: Controller
    vocabularies: Mapping[str, str]
    """Vocabulary fingerprint that a source was made for; a source that is not listed fits any."""
    hidden_size: int = 0
    """Size of the hidden states that a source reads; 0 if none reads any."""
    context: int = 0
    """The target's context in tokens, if a source reads hidden states."""
    grammars: Grammars | None = None
    """Grammars of the sessions; None if nothing is drafted."""
    learning: DraftLearning | None = None
    """The learning of the hidden-state draft, if it is on."""

    def grammar(self, generate: Generate) -> DraftGrammar | None:
        """Return the grammar of a session; None if its text is free, or drafts cannot follow its grammar."""
        grammar = generate.sampling.grammar
        if grammar is None or self.grammars is None:
            return None
        from shared.grammar.token_masks import DraftGrammar

        try:
            return DraftGrammar(self.grammars.session(generate.session, grammar), grammar.prompt_len)
        except WispError as error:
            logging.get().warning("drafts do not follow the grammar", error=str(error))
            return None

    def close(self, session_id: str) -> None:
        """Drop the state of an ended session in its grammar."""
        if self.grammars is not None:
            self.grammars.forget(session_id)

    def hidden_rows(self) -> HiddenRows:
        """Return an empty store for the hidden states of a new session."""
        return HiddenRows(self.hidden_size, self.context)

    def choose(self, generate: Generate) -> SourceChoice:
        """Return the source that the request asks for, or the nearest available one."""
        wanted = self.default if generate.draft == AUTO or set(self.sources) == {NONE} else generate.draft
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
            wanted = FALLBACK
        kind = SOURCES[wanted]
        copies = LOOKUP in kind.token_sources or (set(self.sources) == {NONE} and _may_copy(generate.draft))
        return SourceChoice(self.sources[wanted], kind.token_sources, kind.reads_hidden_states, copies)


def _may_copy(asked: str) -> bool:
    """Return whether a request that asks for this draft source leaves prompt lookup to the suite."""
    return asked == AUTO or (asked in SOURCES and LOOKUP in SOURCES[asked].token_sources)


def load_drafting(settings: DraftSettings) -> Drafting:
    """Load sources and controller as the settings ask. Raises ModelError or SettingsError."""
    loaded = load_sources(settings)
    default = settings.draft_source
    if default == AUTO:
        default = next(name for name in PREFERRED if name in loaded)
    shipped = next((source.controller for source in loaded.values() if source.controller is not None), None)
    weights = settings.controller or shipped or ControlWeights()
    if isinstance(weights, Path):
        weights = load_weights(weights)
    learning = next((source.learning for source in loaded.values() if source.learning is not None), None)
    if settings.draft_learning and learning is None:
        logging.get().warning("no hidden-state draft is loaded, so none learns")
    return Drafting(
        {name: source.source for name, source in loaded.items()},
        default,
        Controller(settings.stop_rule, settings.draft_length, weights),
        {name: source.vocab_fingerprint for name, source in loaded.items() if source.vocab_fingerprint is not None},
        max(source.hidden_size for source in loaded.values()),
        max(source.context for source in loaded.values()),
        _grammars(settings),
        learning,
    )


def _grammars(settings: DraftSettings) -> Grammars | None:
    """Return the grammars for the target; None without its folder or llguidance, which copies do not need."""
    try:
        # Not imported above: a drafter of copies does without the packages of grammars.
        from shared.grammar.masks import Grammars

        return Grammars.of(ModelFolder(settings.target))
    except ModuleNotFoundError as error:
        logging.get().info("drafts follow no grammars: a package is missing", package=error.name)
    except ModelError:
        pass
    return None


def no_drafting() -> Drafting:
    """Return plain decoding for every request, whatever source it asks for. Loads nothing."""
    return Drafting({NONE: NoDrafts()}, NONE, Controller("fixed", 0), {})
