"""The twin: answers and drafts without a model, in the time of a target profile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from broker_contract import Inbox
from memory_broker import MemoryBroker
from memory_store import MemoryStore
from twins import STEP_MS, make_twin, profile_text

from services.drafter.control import Controller, ControlWeights
from services.drafter.drafting import Drafting, load_drafting
from services.drafter.settings import DraftSettings
from services.drafter.sources import DraftRequest, States
from services.tools.bench.load.core.measures import Window, lag_of, measure
from services.tools.bench.load.core.results import LoadResults, MeasuredPoint, notes
from services.tools.bench.load.lateness import EmulationLog
from services.tools.local import target
from services.tools.local.progress import Progress
from services.tools.local.target import prepare_target, prepare_twin
from services.verifier.core.tasks import VerifyTask
from services.verifier.engine_thread import load_engine
from services.verifier.membership import Membership
from services.verifier.profile import profile
from services.verifier.settings import VerifierSettings
from services.verifier.verify import verify
from shared import cost
from shared.broker import topology
from shared.engine.steps import ChoiceRow, Step
from shared.errors import ModelError, SettingsError
from shared.messages import Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.twin.engine import TwinEngine
from shared.twin.files import load_target, shipped_targets
from shared.twin.folder import TwinFolder, write_own_twin
from shared.twin.lateness import EVENT, Lateness
from shared.twin.layout import is_twin
from shared.twin.profile import parse_target
from shared.twin.spec import Acceptance
from shared.twin.text import SyntheticText

PROMPT = list(range(40, 60))
SEED = 7


@pytest.fixture
def twin(tmp_path: Path) -> TwinFolder:
    """A twin with steps of 8 ms."""
    return make_twin(tmp_path)


def task(tokens: list[int], draft: list[int], room: int = 100) -> VerifyTask:
    return VerifyTask("s", tokens, draft, Sampling(seed=SEED), frozenset(), room, prompt_len=len(PROMPT))


def test_an_answer_depends_on_seed_and_position_only(twin: TwinFolder) -> None:
    text, again = SyntheticText(twin.spec), SyntheticText(twin.spec)
    tokens = [text.token(SEED, index) for index in range(200)]
    assert [again.token(SEED, index) for index in reversed(range(200))] == tokens[::-1]
    assert [text.token(SEED + 1, index) for index in range(200)] != tokens
    assert all(text.other(SEED, index) != token for index, token in enumerate(tokens))
    assert Tokenizer(ModelFolder(twin.path)).decode(tokens).isalpha()


def test_answers_end_by_themselves_after_their_mean_length(twin: TwinFolder) -> None:
    text = SyntheticText(twin.spec)

    def length(seed: int) -> int:
        return next(i for i in range(10_000) if text.token(seed, i) == twin.spec.stop_id)

    lengths = [length(seed) for seed in range(300)]
    assert min(lengths) >= 1
    assert fmean(lengths) == pytest.approx(twin.spec.answer_tokens, rel=0.2)


def test_a_step_takes_the_time_of_the_profile(twin: TwinFolder) -> None:
    engine = TwinEngine(twin.path)
    engine.attach("s", PROMPT)
    started = time.perf_counter()
    output = engine.forward([Step("s", PROMPT)])
    took_ms = (time.perf_counter() - started) * 1000
    assert took_ms >= STEP_MS + 0.1 * len(PROMPT) - 0.2
    assert output.choose([ChoiceRow(0, Sampling(seed=SEED), len(PROMPT), len(PROMPT))]) == [
        SyntheticText(twin.spec).token(SEED, 0)
    ]
    assert engine.cached("s") == len(PROMPT)


def test_verification_accepts_the_right_part_of_a_draft(twin: TwinFolder) -> None:
    engine, text = TwinEngine(twin.path), SyntheticText(twin.spec)
    answer = [text.token(SEED, index) for index in range(6)]
    [outcome], [shape] = verify(engine, [task(PROMPT, [*answer[:3], text.other(SEED, 3), answer[4]])])
    assert outcome.verdict is not None
    assert (outcome.verdict.accepted, outcome.verdict.tokens) == (3, answer[:4])
    assert (shape.new_tokens, shape.rows) == (len(PROMPT) + 5, 6)
    assert outcome.cached == len(PROMPT) + 3
    [following], _ = verify(engine, [task([*PROMPT, *answer[:4]], [])])
    assert following.verdict is not None
    assert following.verdict.tokens == answer[4:5]
    assert following.new_tokens == 1


def test_a_twin_is_profiled_at_its_start_like_a_model(twin: TwinFolder) -> None:
    measured = profile(TwinEngine(twin.path), budget_s=0.2)
    assert measured
    for one in measured:
        assert one.measured_ms > twin.profile.time_ms(one.shape) - 0.3


def test_the_kv_budget_is_that_of_the_profile(twin: TwinFolder) -> None:
    engine = load_engine(twin.path, VerifierSettings(cache_tokens=64), keep_hidden=False)
    assert engine.budget_tokens == twin.profile.kv_tokens


def drafting_of(twin: TwinFolder, **settings: object) -> Drafting:
    return load_drafting(DraftSettings(target=twin.path, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("acceptance", [0.5, 0.9])
def test_draft_tokens_are_right_with_the_twins_acceptance(tmp_path: Path, acceptance: float) -> None:
    twin = make_twin(tmp_path, acceptance=acceptance)
    source = drafting_of(twin).sources["hidden"]
    source._engine._step_ms = 0.0  # type: ignore[attr-defined]
    text, right = SyntheticText(twin.spec), []
    controller = Controller("fixed", 1, ControlWeights())
    for seed in range(150):
        control = controller.session("hidden")
        tokens = list(PROMPT)
        for index in range(6):
            round_ = control.ahead(1, 0.0)
            start = source.starts_at(str(seed), len(tokens))
            rows = len(tokens) - 1 - max(0, start - 1)
            states = States(max(0, start - 1), ModelRows.of(rows))
            [draft] = source.propose(
                [
                    DraftRequest(
                        str(seed), tokens, Sampling(seed=seed), round_, ("hidden",), states, prompt_len=len(PROMPT)
                    )
                ]
            )
            assert len(draft.tokens) == 1
            answer = text.token(seed, index)
            right.append(draft.tokens[0] == answer)
            tokens.append(answer)
        source.close(str(seed))
    assert fmean(right) == pytest.approx(acceptance, abs=0.05)


class ModelRows:
    """Hidden states of a twin: one element each."""

    @staticmethod
    def of(count: int):  # type: ignore[no-untyped-def]
        import numpy as np

        return np.zeros((count, 1), np.float32)


def test_a_twin_drafts_from_its_hidden_states_alone(twin: TwinFolder) -> None:
    drafting = drafting_of(twin)
    assert drafting.default == "hidden"
    assert drafting.hidden_size == 1
    assert "combined" not in drafting.sources
    with pytest.raises(ModelError, match="repeat nothing"):
        drafting_of(twin, draft_source="combined")


@pytest.mark.slow
def test_services_of_a_twin_load_no_torch(twin: TwinFolder) -> None:
    code = f"""
import sys
from pathlib import Path
import services.baseline.engine, services.drafter.service, services.verifier.service
from services.drafter.drafting import load_drafting
from services.drafter.settings import DraftSettings
from services.verifier.engine_thread import load_engine
from services.verifier.profile import profile
from services.verifier.settings import VerifierSettings
folder = Path({str(twin.path)!r})
load_drafting(DraftSettings(target=folder))
profile(load_engine(folder, VerifierSettings(), keep_hidden=True), 0.01)
if loaded := {{"torch", "transformers"}} & sys.modules.keys():
    sys.exit(f"loads {{loaded}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("has_logits", "features"), [(False, []), (True, ["grammar", "rules", "logprobs", "reasoning_budget_2"])]
)
async def test_a_twin_announces_no_features_that_need_logits(
    twin: TwinFolder, has_logits: bool, features: list[str]
) -> None:
    engine, broker, store, heartbeats = TwinEngine(twin.path), MemoryBroker(), MemoryStore(), Inbox()
    if has_logits:
        engine.has_logits = True
    sessions = SimpleNamespace(cached={})
    thread = SimpleNamespace(broker=broker, registry=store.registry)
    parts: list[Any] = [engine, sessions, None, None, thread]
    await broker.consume(broker.topology.own_queue("scheduler", "s1", (topology.heartbeat("v"),)), heartbeats)
    await Membership("v", "f", *parts)._publish_heartbeat()
    (published, again), stored = [await heartbeats.next() for _ in range(2)], await store.registry.heartbeats()
    assert [heartbeat.features for heartbeat in (published, again, *stored)] == [features] * 3


def test_another_profile_is_another_model(tmp_path: Path) -> None:
    first, second = (make_twin(tmp_path / name, step_ms=ms) for name, ms in (("a", 8.0), ("b", 9.0)))
    same = make_twin(tmp_path / "c")
    prints = [ModelFolder(one.path).fingerprint("bfloat16") for one in (first, second, same)]
    assert prints[0] == prints[2] != prints[1]


def test_a_twin_is_prepared_from_a_profile_and_used_as_a_target(
    twin: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_target(str(twin.path), Progress()) == twin.path.absolute()
    monkeypatch.setattr(target, "state_folder", lambda: tmp_path)
    made = prepare_twin("h100-qwen3-8b", str(twin.path), Progress(), 0.6)
    assert (is_twin(made), made.name) == (True, "h100-qwen3-8b")
    opened = TwinFolder.open(made)
    assert opened.spec.acceptance.mean == 0.6
    assert opened.profile == load_target("h100-qwen3-8b")


def test_a_twin_of_other_settings_leaves_the_first_one_as_it_is(twin: TwinFolder, tmp_path: Path) -> None:
    words, under = tmp_path / "words", tmp_path / "twins"

    def own(mean: float) -> TwinFolder:
        return write_own_twin("h100-qwen3-8b", words, under, Acceptance(mean=mean))

    first, second = own(0.6), own(0.7)
    assert first.path != second.path
    assert TwinFolder.open(first.path).spec.acceptance.mean == 0.6
    written = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert own(0.6).path == first.path
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == written, "a suite may be using it"
    (words / "chat_template.jinja").write_text("{{ messages }}")
    assert own(0.6).path not in (first.path, second.path), "another tokenizer"


def test_a_folder_that_is_being_rewritten_is_no_twin(twin: TwinFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        make_twin(twin.path.parent, acceptance=0.5)
    assert not is_twin(twin.path)


@pytest.mark.parametrize("name", ["nothing.toml", "qwen"])
def test_a_missing_profile_names_the_shipped_ones(name: str) -> None:
    with pytest.raises(SettingsError, match=shipped_targets()[0]):
        load_target(name)


def test_a_measured_profile_gives_the_time_of_its_coefficients() -> None:
    target = parse_target(profile_text(step_ms=5.0, token_ms=0.5), "mine")
    assert target.time_ms(cost.shape_of([(4, 100, 4)])) == pytest.approx(7.0)
    assert target.time_ms(cost.EMPTY) == 0.0
    assert target.kv_tokens == 4096
    model = target.cost_model("verifier")
    shape = cost.shape_of([(9, 300, 9)] * 4)
    assert cost.predict_ms(model, shape) == pytest.approx(target.time_ms(shape), rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": [1.0]}, "coefficients: List should have at least 7 items"),
        ({"coefficients": [1.0] * 6 + [-1.0]}, "must be 0 or more"),
        ({"cache_tokens": 0}, "cache_tokens: must be more than 0"),
        ({"speed": 1}, "speed: there is no such field"),
    ],
)
def test_a_bad_measured_profile_is_an_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_target(json.dumps(json.loads(profile_text()) | change), "mine")


def test_lateness_is_logged_and_added_up_over_processes(tmp_path: Path) -> None:
    def line(emulated: float, late: float) -> str:
        return json.dumps({"event": EVENT, "emulated_ms": emulated, "late_ms": late}) + "\n"

    log = EmulationLog(tmp_path)
    assert log.take() is None
    (tmp_path / "verifier-1.log").write_text('{"event": "ready"}\n' + line(100, 1))
    (tmp_path / "drafter-1.log").write_text(line(50, 0) + line(100, 5))
    assert log.take() == pytest.approx(6 / 200)
    assert log.take() is None
    with (tmp_path / "verifier-1.log").open("a") as file:
        file.write(line(300, 21) + '{"event": "emulated time", "emul')
    assert log.take() == pytest.approx(20 / 200)


def test_lateness_sums_early_and_late_ends() -> None:
    lateness = Lateness()
    for late_ms in (0.5, -0.5, 2.0):
        lateness.add(10.0, late_ms)
    assert (lateness.emulated_ms, lateness.late_ms) == (30.0, 2.0)


@pytest.mark.parametrize(("share", "marked"), [(0.019, False), (0.021, True), (None, False)])
def test_a_point_whose_emulation_was_late_is_marked(share: float | None, marked: bool) -> None:
    window = Window(warm_up_s=0, measure_s=1, drain_s=0)
    point = MeasuredPoint(
        arm="wisp+", sessions=3, repeat=0, measures=measure([], window), lag=lag_of([], [], 0.0), late_share=share
    )
    assert point.follows is not marked
    found = " ".join(notes(LoadResults(window=window, points=[point])))
    assert ("THE EMULATION WAS LATE: wisp+ at 3 sessions, by 2.1%" in found) is marked
