"""Drafts that learn from their sessions: weights that improve, versions on disk, and swaps that change no text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import builders
import numpy as np
import pytest
import tiny
import torch
from transformers import LlamaConfig

from services.drafter.control import Controller
from services.drafter.core.observed import ObservedSession, ObservedText, StateRecorder
from services.drafter.hidden import weights
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine, DraftStep
from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.module_pass import ModuleDraft
from services.drafter.hidden.target_parts import target_parts
from services.drafter.hidden.tensors import draft_tensors
from services.drafter.learning import process
from services.drafter.learning.learner import DraftLearner
from services.drafter.learning.loss import bottom_outputs
from services.drafter.learning.reports import LearningOptions, LearningOutcome, LearningReport
from services.drafter.learning.supervisor import DraftLearning, LearningSetup
from services.drafter.learning.versions import KEPT, UNFINISHED, VersionFolder
from services.drafter.sources import Draft, DraftRequest
from services.drafter.sources.hidden import HiddenDrafts
from services.tools.bench.draft.one_process import tokens_per_second
from services.tools.bench.learning.__main__ import NO_COSTS, observed
from services.tools.training.answering import EngineTarget
from services.tools.training.evaluate import Summary, rounds
from services.tools.training.generate import Assignment, generate
from services.tools.training.shards import GeneratedText
from services.tools.training.train import initialise
from shared.engine import Engine
from shared.errors import ModelError
from shared.kernels.cache import PackedBatch
from shared.messages import HiddenFormat, HiddenStates
from shared.models.folder import ModelFolder
from shared.models.hidden_states import parts

CONFIG = LlamaConfig(**{**tiny.LLAMA.to_dict(), "vocab_size": tiny.VOCAB})
OPTIONS = LearningOptions(
    buffer_tokens=6000,
    rate=5e-3,
    fc_rate=1.0,
    pull=0.0,
    updates=20,
    passes=6,
    draft_steps=2,
    judged_steps=2,
    yields=False,
)
"""A spoilt draft needs larger steps than a trained one."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return tiny.target(tmp_path_factory.mktemp("target"), CONFIG)


@pytest.fixture(scope="module")
def texts(target: ModelFolder) -> list[GeneratedText]:
    """Answers of the target to random prompts."""
    engine = Engine(target.path, dtype="float32", budget_tokens=8192, keep_hidden=True)
    random = np.random.default_rng(4)
    asked = [Assignment(i, "code", random.integers(2, 40, 12).tolist(), 0.3, 60) for i in range(60)]
    made = generate(EngineTarget(engine, 16), asked, frozenset(), 1, serving_noise=True)
    return sorted(made, key=lambda text: text.origin)


@pytest.fixture(scope="module")
def good(
    target: ModelFolder, texts: list[GeneratedText], tmp_path_factory: pytest.TempPathFactory
) -> HiddenDraftFolder:
    """A draft that runs the whole target, whose input projection is the best linear one."""
    folder = tmp_path_factory.mktemp("good")
    config = tiny.hidden_draft(folder, target, bottom_layers=2).card.model
    torch.manual_seed(1)
    model = HiddenDraft(config)
    parts_of_target = target_parts(target, 2, torch.float32)
    whole = [replace(text, bottom=bottom_outputs(parts_of_target, text.tokens.long())) for text in texts]
    initialise(model, whole, parts_of_target, seed=1)
    weights.save(folder, model, torch.arange(tiny.VOCAB), target)
    return HiddenDraftFolder.open(folder)


@pytest.fixture(scope="module")
def draft(good: HiddenDraftFolder, target: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> HiddenDraftFolder:
    """The same draft, spoilt by noise."""
    folder = tmp_path_factory.mktemp("draft")
    model, head_ids = weights.load(good, torch.float32)
    with torch.no_grad():
        random = torch.Generator().manual_seed(2)
        noise = torch.randn(model.fc.weight.shape, generator=random) * model.fc.weight.std()
        model.fc.weight.add_(noise)
    weights.save(folder, model, head_ids, target)
    return HiddenDraftFolder.open(folder)


@pytest.fixture(scope="module")
def learned(
    target: ModelFolder, draft: HiddenDraftFolder, texts: list[GeneratedText]
) -> tuple[DraftLearner, list[LearningReport]]:
    """A learner that has seen all texts, and its reports."""
    learner = DraftLearner(draft, target, OPTIONS)
    return learner, list(learn_all(learner, texts))


def learn_all(learner: DraftLearner, texts: Sequence[GeneratedText]) -> Iterator[LearningReport]:
    for text in texts:
        learner.add(observed(text))
        while learner.has_work:
            if (report := learner.work()) is not None:
                yield report


@pytest.mark.slow
def test_a_draft_learns_and_its_weights_are_taken(learned: tuple[DraftLearner, list[LearningReport]]) -> None:
    _, reports = learned
    taken = [report for report in reports if report.outcome is LearningOutcome.TAKEN]
    assert [report.version for report in taken] == list(range(1, len(taken) + 1))
    assert all((report.weights is None) == (report not in taken) for report in reports)
    assert taken[-1].acceptance > taken[-1].shipped_acceptance + 0.1
    assert taken[-1].acceptance > taken[0].acceptance
    assert reports[-1].updates == len(reports) * OPTIONS.updates


@pytest.mark.slow
def test_learned_weights_are_accepted_in_serving_too(
    learned: tuple[DraftLearner, list[LearningReport]],
    draft: HiddenDraftFolder,
    target: ModelFolder,
    texts: list[GeneratedText],
    tmp_path: Path,
) -> None:
    """The score on held-back texts is the acceptance of the first token in rounds."""

    def acceptance(folder: HiddenDraftFolder) -> float:
        source = HiddenDrafts(DraftEngine(folder, target, dtype="float32"))
        drafted = list(rounds(source, ("hidden",), Controller("fixed", 1), texts[4::5]))  # the held-back ones
        return Summary.of(drafted, NO_COSTS).by_position[0]

    weights.save(tmp_path, learned[0].current(), learned[0].head_ids, target)
    before, after = acceptance(draft), acceptance(HiddenDraftFolder.open(tmp_path))
    assert after > before + 0.1
    assert after == pytest.approx(learned[1][-1].acceptance, abs=0.1)


@pytest.mark.slow
def test_the_same_texts_give_the_same_weights(
    learned: tuple[DraftLearner, list[LearningReport]],
    target: ModelFolder,
    draft: HiddenDraftFolder,
    texts: list[GeneratedText],
) -> None:
    first = next(learn_all(DraftLearner(draft, target, OPTIONS), texts))
    assert replace(first, weights=None) == replace(learned[1][0], weights=None)


@pytest.mark.slow
def test_worse_weights_are_rolled_back(
    good: HiddenDraftFolder, draft: HiddenDraftFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    """As when the texts become others than those that the weights were taken for."""
    learner = DraftLearner(good, target, replace(OPTIONS, rate=1e-6), version=3, kept=draft)
    report = next(learn_all(learner, texts))
    assert (report.outcome, report.version) == (LearningOutcome.ROLLED_BACK, 4)
    assert report.acceptance == report.shipped_acceptance > 0.2
    assert report.weights is not None
    shipped = draft_tensors(good)
    assert all(np.array_equal(values, shipped[name]) for name, values in report.weights.items())


@pytest.mark.slow
def test_a_candidate_that_becomes_worse_begins_again(
    good: HiddenDraftFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    """A linear guess is the best draft of this target, so that learning spoils it."""
    learner = DraftLearner(good, target, replace(OPTIONS, rate=2e-2))
    reports = list(learn_all(learner, texts))
    outcomes = {report.outcome for report in reports}
    assert LearningOutcome.REJECTED in outcomes
    assert LearningOutcome.TAKEN not in outcomes
    assert learner.version == 0


@pytest.mark.slow
def test_weights_are_drawn_back_to_the_shipped_ones(
    draft: HiddenDraftFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    shipped = {
        name: torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
        for name, values in draft_tensors(draft).items()
        if name != "head_ids"
    }

    def distance(pull: float) -> float:
        learner = DraftLearner(draft, target, replace(OPTIONS, pull=pull))
        next(learn_all(learner, texts))
        moved = learner.candidate().state_dict()
        return sum(float((moved[name] - values).square().sum()) for name, values in shipped.items())

    assert distance(60.0) < 0.5 * distance(0.0)


def test_broken_states_are_not_learned_from(
    target: ModelFolder, draft: HiddenDraftFolder, texts: list[GeneratedText]
) -> None:
    learner = DraftLearner(draft, target, OPTIONS)
    for text in texts[:30]:
        made = observed(text)
        broken = made.states.copy()
        broken[5, 3] = 0x7FC0  # NaN
        learner.add(replace(made, states=broken))
    assert not learner.has_work


class SwappingDrafts(HiddenDrafts):
    """A source whose weights are replaced before every call, by another thread."""

    def __init__(self, engine: DraftEngine, versions: Sequence[HiddenDraftFolder]) -> None:
        super().__init__(engine)
        self.made: list[list[int]] = []
        self._versions = [draft_tensors(version) for version in versions]

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        chosen = self._versions[len(self.made) % len(self._versions)]
        thread = threading.Thread(target=self._engine.replace, args=(chosen,))
        thread.start()
        thread.join()
        drafts = super().propose(requests)
        self.made.append(drafts[0].tokens)
        return drafts


@pytest.mark.slow
def test_swapping_weights_within_a_session_changes_no_text(
    good: HiddenDraftFolder, draft: HiddenDraftFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    engine = Engine(target.path, dtype="float32", budget_tokens=2048, keep_hidden=True)
    swapping = SwappingDrafts(DraftEngine(good, target, dtype="float32"), [draft, good])
    steady = SwappingDrafts(DraftEngine(good, target, dtype="float32"), [good])
    for source in (swapping, steady):
        for text in texts[:4]:  # raises if the text differs
            tokens_per_second(engine, source, ("hidden",), Controller("fixed", 3), text, frozenset())
    assert len(swapping.made) > len(steady.made), "the untrained weights were really in use"


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_replaced_weights_compute_as_if_loaded(
    good: HiddenDraftFolder, draft: HiddenDraftFolder, target: ModelFolder, form: str
) -> None:
    replaced, loaded = (DraftEngine(folder, target, dtype=form, budget_tokens=512) for folder in (draft, good))
    states = np.random.default_rng(1).standard_normal((9, replaced.hidden_size), np.float32)

    def estimate(engine: DraftEngine, name: str) -> np.ndarray:
        engine.open(name)
        return engine.forward([DraftStep(name, list(range(9)), states)])

    before = estimate(replaced, "running")
    for newer in (draft, good):
        replaced.replace(draft_tensors(newer))
    assert len(replaced._replacements) == 1, "an idle drafter keeps the newest weights only"
    assert np.array_equal(estimate(replaced, "new"), estimate(loaded, "new"))
    assert not np.array_equal(before, estimate(loaded, "other"))
    assert replaced.length("running") == 9
    assert np.isfinite(replaced.forward([DraftStep("running", [3], states[:1])])).all()


def test_replaced_weights_on_modules(good: HiddenDraftFolder, draft: HiddenDraftFolder, target: ModelFolder) -> None:
    """As on an accelerator."""
    passes = [ModuleDraft(f, target, dtype="float32", torch_device="cpu", blocks=4) for f in (draft, good)]
    wanted = {name: values for name, values in draft_tensors(good).items() if name != "head_ids"}
    passes[0].replacement(wanted)()
    states = np.ones((3, 64), np.float32)
    found = [made.forward([1, 2, 3], states, PackedBatch([[0, 1]], [0], [3])) for made in passes]
    assert np.array_equal(*found)
    with pytest.raises(ModelError, match="not those of the draft"):
        passes[0].replacement({"fc.weight": wanted["fc.weight"]})


def test_the_newest_usable_version_is_found(
    tmp_path: Path, good: HiddenDraftFolder, draft: HiddenDraftFolder, target: ModelFolder
) -> None:
    versions = VersionFolder(tmp_path, draft, "target-a")
    assert versions.newest() is None
    assert versions.lock()
    made, head_ids = weights.load(good, torch.float32)
    for number in (1, 2, 3):
        versions.keep(number, lambda path: weights.save(path, made, head_ids, target), {"version": number})
    assert len(list(versions.path.glob("version-*"))) == KEPT
    newest = versions.newest()
    assert newest is not None
    assert json.loads((newest.path / "learned.json").read_text()) == {"version": 3}
    assert all(np.array_equal(a, draft_tensors(good)[n]) for n, a in draft_tensors(newest).items())
    (newest.path / "model.safetensors").write_bytes(b"broken")
    assert versions.newest() == HiddenDraftFolder.open(versions.path / "version-2")
    assert versions.last_number == 3
    assert VersionFolder(tmp_path, draft, "target-b").newest() is None, "bound to the target"
    assert VersionFolder(tmp_path, good, "target-a").newest() is None, "bound to the shipped draft"
    assert not VersionFolder(tmp_path, draft, "target-a").lock(), "one process keeps versions"


def test_a_version_that_was_being_written_is_removed(tmp_path: Path, draft: HiddenDraftFolder) -> None:
    versions = VersionFolder(tmp_path, draft, "target-a")
    (versions.path / f".abcd{UNFINISHED}").mkdir(parents=True)
    assert versions.lock()
    assert [path.name for path in versions.path.iterdir()] == ["lock"]


def test_learning_pauses_while_sessions_are_served() -> None:
    ours, theirs = Pipe()
    idle = SimpleNamespace(value=False)
    done: list[tuple[str, bool]] = []
    worked = threading.Event()

    class Learner:
        has_work = True

        def add(self, text: str) -> None:
            done.append((text, idle.value))

        def work(self) -> LearningReport | None:
            done.append(("work", idle.value))
            worked.set()
            return None

    def run() -> None:
        with pytest.raises(EOFError):
            process.learn(theirs, idle, Learner(), lambda report: None)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    for number in range(3):
        ours.send(f"text {number}")
    assert not worked.wait(3 * process.PAUSE_S)
    assert done == []
    idle.value = True
    assert worked.wait(10)
    idle.value = False
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    assert done[:4] == [("text 0", True), ("text 1", True), ("text 2", True), ("work", True)]


def sessions_of(texts: Sequence[GeneratedText], size: int) -> Iterator[ObservedSession]:
    for text in texts:
        made: ObservedText = observed(text)
        recorder = StateRecorder(size, 1000)
        for part in parts(made.states, made.start, HiddenFormat.BFLOAT16):
            recorder.add(HiddenStates(session="s", round=0, **vars(part)))
        yield ObservedSession(text.tokens.tolist(), text.prompt_len, made.sampling, recorder)


@pytest.mark.slow
def test_a_drafter_takes_and_keeps_what_its_process_has_learned(
    tmp_path: Path, draft: HiddenDraftFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    setup = LearningSetup(draft, target.path, 64, OPTIONS, tmp_path)
    setup.check()
    taken: list[object] = []
    swapped = threading.Event()

    def replace_weights(made: object) -> None:
        taken.append(made)
        swapped.set()

    learning = DraftLearning(setup, replace_weights)
    with learning.running():
        assert learning.recorder(builders.generate(fingerprint="fp-a")) is not None
        assert learning.recorder(builders.generate(fingerprint="fp-b")) is None, "another target"
        for session in sessions_of(texts, 64):
            learning.observe(session)
        assert swapped.wait(120)
    state = learning.state
    assert state is not None
    assert state.version >= 1
    assert state.acceptance > state.shipped_acceptance
    kept = VersionFolder(tmp_path, draft, "fp-a").newest()
    assert kept is not None

    swapped.clear()
    again = DraftLearning(setup, replace_weights)
    with again.running():
        again.recorder(builders.generate(fingerprint="fp-a"))
        assert swapped.wait(10), "the kept weights are in use without learning"
    found = taken[-1]
    assert isinstance(found, dict)
    assert np.array_equal(found["fc.weight"], draft_tensors(kept)["fc.weight"])


def test_learning_without_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, draft: HiddenDraftFolder, target: ModelFolder
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="WISP_DRAFT_LEARNING"):
        LearningSetup(draft, target.path, 64, OPTIONS, None).check()
