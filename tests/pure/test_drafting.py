"""The loading of draft sources, and the choice among them for each request."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import cast, get_args

import builders
import pytest
from memory_store import MemoryStore

from services.drafter.control import Controller, ControlWeights
from services.drafter.control.rules import RULES
from services.drafter.drafting import Drafting, load_drafting
from services.drafter.service import Drafter
from services.drafter.settings import DrafterSettings
from services.drafter.sources import LookupDrafts, NoDrafts
from services.drafter.sources.registry import AUTO, FALLBACK, PREFERRED, SOURCES
from shared.broker.client import Broker
from shared.errors import ModelError, SettingsError
from shared.messages import Generate, Grammar, Sampling
from shared.state.store import Store

ROOT = Path(__file__).parents[2]


def generate(draft: str, vocabulary: str = "v") -> Generate:
    return builders.generate(draft=draft, vocab_fingerprint=vocabulary)


@pytest.fixture
def drafting() -> Drafting:
    """Sources without models; another source stands for the one that reads hidden states."""
    hidden = NoDrafts()
    sources = {"none": NoDrafts(), "lookup": LookupDrafts(), "hidden": hidden, "combined": hidden}
    return Drafting(sources, "combined", Controller("fixed", 4), {"hidden": "v", "combined": "v"}, 64)


@pytest.mark.parametrize(
    ("asked", "names", "reads_states"),
    [
        ("auto", ("hidden", "lookup"), True),
        ("combined", ("hidden", "lookup"), True),
        ("hidden", ("hidden",), True),
        ("lookup", ("lookup",), False),
        ("none", (), False),
    ],
)
def test_a_request_gets_the_source_that_it_asks_for(
    drafting: Drafting, asked: str, names: tuple[str, ...], reads_states: bool
) -> None:
    choice = drafting.choose(generate(asked))
    assert (choice.token_sources, choice.reads_hidden_states) == (names, reads_states)


def test_a_missing_source_is_replaced_by_the_default(drafting: Drafting) -> None:
    assert drafting.choose(generate("model")).token_sources == ("hidden", "lookup")


def test_a_draft_for_another_vocabulary_is_replaced_by_lookup(drafting: Drafting) -> None:
    assert drafting.choose(generate("auto", "another")).token_sources == ("lookup",)
    assert drafting.choose(generate("none", "another")).token_sources == ()


def test_a_drafter_without_torch_drafts_by_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_drafting(DrafterSettings()).default == "lookup"
    with pytest.raises(ModelError, match="needs torch"):
        load_drafting(DrafterSettings(draft_source="combined"))
    with pytest.raises(ModelError, match="needs torch"):
        load_drafting(DrafterSettings(hidden_draft=ROOT))


def test_a_drafter_without_llguidance_drafts_without_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_drafting(DrafterSettings(draft_source="lookup")).grammars is not None
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "shared.grammar.masks")
    drafting = load_drafting(DrafterSettings(draft_source="lookup"))
    sampling = Sampling(grammar=Grammar(text="start: /a+/", prompt_len=1))
    assert (drafting.grammars, drafting.grammar(builders.generate(sampling=sampling))) == (None, None)


async def test_an_ended_session_leaves_no_state_in_its_grammar() -> None:
    settings = DrafterSettings(draft_source="lookup")
    drafting = load_drafting(settings)
    assert drafting.grammars is not None
    broker, store = cast("Broker", None), cast("Store", MemoryStore())
    drafter = Drafter("d1", "p", settings.options, drafting, broker, store, None)
    grammar = Grammar(text="start: /a+/", prompt_len=1)
    session = drafting.grammars.session("s", grammar)
    await drafter._generate(builders.generate(session="s", sampling=Sampling(grammar=grammar)))
    assert drafting.grammars.session("s", grammar) is not session


def test_a_drafter_without_the_targets_folder_drafts_by_lookup(tmp_path: Path) -> None:
    assert load_drafting(DrafterSettings(target=tmp_path / "none")).default == "lookup"
    with pytest.raises(ModelError, match="no model folder"):
        load_drafting(DrafterSettings(target=tmp_path / "none", draft_source="hidden"))


def test_a_folder_without_a_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: No such file.*wisp draft train"):
        load_drafting(DrafterSettings(hidden_draft=tmp_path))
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(ModelError, match=r"config\.json: model\.layer: Field required\).*wisp draft train"):
        load_drafting(DrafterSettings(hidden_draft=tmp_path))


def test_a_rule_that_needs_weights_is_refused_without_them() -> None:
    with pytest.raises(SettingsError, match="wisp controller train"):
        load_drafting(DrafterSettings(draft_source="lookup", stop_rule="predictor"))


def test_settings_accept_the_registered_sources_and_rules() -> None:
    fields = DrafterSettings.model_fields
    assert set(get_args(fields["draft_source"].annotation)) == {AUTO, *SOURCES}
    assert set(get_args(fields["stop_rule"].annotation)) == set(RULES)


def test_the_names_of_sources_load_neither_torch_nor_numpy() -> None:
    code = "import sys, services.drafter.sources.registry; print({'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("name", [AUTO, *SOURCES, *RULES])
def test_the_page_on_drafts_describes_every_source_and_rule(name: str) -> None:
    page = (ROOT / "services/drafter/README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{name}`", page, re.MULTILINE)


def test_the_fallback_is_preferred_last_and_needs_no_model() -> None:
    assert PREFERRED[-1] == FALLBACK
    assert not SOURCES[FALLBACK].needs_torch


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.needs_predictor])
def test_a_rule_without_a_predictor_works_untrained(name: str) -> None:
    assert isinstance(RULES[name].for_session(ControlWeights()), RULES[name])


@pytest.mark.slow
def test_sources_without_a_model_load_no_torch() -> None:
    code = """
import sys
from services.drafter.drafting import load_drafting
from services.drafter.settings import DrafterSettings
for name in sys.argv[1:]:
    load_drafting(DrafterSettings(draft_source=name))
    if "torch" in sys.modules:
        sys.exit(f"{name} loads torch")
"""
    names = [name for name, kind in SOURCES.items() if not kind.needs_torch]
    assert names
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
