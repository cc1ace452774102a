"""Training of the controller on rounds with a known law: it keeps the right features and estimates the truth."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from services.drafter.control import Controller, DraftToken
from services.drafter.control.features import NAMES
from services.drafter.control.records import RoundRecord
from services.drafter.control_files import load_weights, write_record
from services.tools.cli.controller_command import app
from services.tools.training import classifiers
from services.tools.training.controller import ControllerReport, SourceReport, train
from shared.errors import SettingsError
from shared.log_odds import sigmoid

pytestmark = pytest.mark.slow  # trainings


def confidence_for(x: float) -> float:
    return min(0.998, max(0.002, sigmoid(x)))


def truth(x: float, target_entropy: float, agreed: bool) -> float:
    """Return a model token's acceptance: below its confidence, lower if the target is unsure, higher on agreement."""
    return sigmoid(0.7 * x - 0.9 - 0.8 * (target_entropy - 1) + 0.8 * agreed)


def record_sessions(path: Path, sessions: int, seed: int, rounds: int = 30) -> None:
    rng = random.Random(seed)
    with path.open("w") as file:
        for session in range(sessions):
            for number in range(rounds):
                target_entropy = rng.gauss(1, 0.7)
                guesses: list[DraftToken] = []
                chances: list[float] = []
                copied = number % 3 == 2
                for _ in range(4):
                    x, agreed = rng.gauss(1, 1.5), rng.random() < 0.3
                    if copied:
                        support = rng.choice([1, 2, 3])
                        guesses.append(DraftToken("lookup", support=support))
                        chances.append(0.25 * support)
                    else:
                        noise = {"margin": rng.random(), "spread": rng.gauss(3, 1)}
                        guesses.append(DraftToken("hidden", confidence_for(x), 2 - x, agreed=agreed, **noise))
                        chances.append(truth(x, target_entropy, agreed))
                accepted = 0
                while accepted < 4 and rng.random() < chances[accepted]:
                    accepted += 1
                record = RoundRecord(
                    session=f"s{session}",
                    kind="chat",
                    temperature=0.7,
                    target_entropy=target_entropy,
                    guesses=guesses,
                    verified=4,
                    accepted=accepted,
                )
                write_record(file, record)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ControllerReport, Path]:
    folder = tmp_path_factory.mktemp("rounds")
    record_sessions(folder / "a.jsonl", 100, seed=1)
    return train([folder / "a.jsonl"], folder / "w.json", seed=3), folder / "w.json"


def source(report: ControllerReport, name: str) -> SourceReport:
    return next(s for s in report.sources if s.source == name)


def kept(report: SourceReport) -> set[str]:
    return {trial.name.removeprefix("+ ") for trial in report.trials if trial.kept}


def test_training_keeps_the_laws_features_and_drops_noise(trained: tuple[ControllerReport, Path]) -> None:
    report = trained[0]
    assert (report.rounds, report.sessions) == (3000, 100)
    assert {"confidence", "agreed", "target_entropy"} <= kept(source(report, "hidden"))
    assert not {"spread", "margin", "position"} & kept(source(report, "hidden"))
    assert kept(source(report, "lookup")) == {"support"}


def test_added_features_raise_the_auc_to_that_of_the_truth(trained: tuple[ControllerReport, Path]) -> None:
    trials = {trial.name: trial for trial in source(trained[0], "hidden").trials}
    rng = random.Random(9)
    law = [truth(rng.gauss(1, 1.5), rng.gauss(1, 0.7), rng.random() < 0.3) for _ in range(20_000)]
    best = classifiers.auc(np.array([rng.random() < p for p in law]), np.array(law))
    chosen = [t for t in source(trained[0], "hidden").trials if t.kept][-1]
    assert chosen.auc == pytest.approx(best, abs=0.03)
    assert trials["confidence"].auc < chosen.auc - 0.02
    assert trials["all"].auc == pytest.approx(chosen.auc, abs=0.01)
    assert trials["MLP of all"].auc > trials["MLP of WISP's five"].auc


def test_training_lowers_the_calibration_error(trained: tuple[ControllerReport, Path]) -> None:
    report = source(trained[0], "hidden")
    assert report.error_before > 0.15
    assert report.error_after < 0.03
    assert sum(b.tokens for b in report.reliability) == report.tokens
    predictions = [b.predicted for b in report.reliability]
    assert predictions == sorted(predictions)


def test_the_live_controller_estimates_the_truth_with_the_weights(trained: tuple[ControllerReport, Path]) -> None:
    weights = load_weights(trained[1])
    for x, target_entropy, agreed in [(2.0, 1.0, False), (0.0, 1.0, True), (1.0, 2.0, False), (3.0, 0.2, True)]:
        round_ = Controller("fixed", 4, weights).session("hidden").begin(4, 0.7, target_entropy)
        round_.add(DraftToken("hidden", confidence_for(x), 2 - x, margin=0.5, spread=3.0, agreed=agreed))
        assert round_.acceptance[0] == pytest.approx(truth(x, target_entropy, agreed), abs=0.08)
    round_ = Controller("fixed", 4, weights).session("lookup").begin(4, 0.7)
    round_.add(DraftToken("lookup", support=3))
    assert round_.acceptance[0] == pytest.approx(0.75, abs=0.06)


def test_the_predictor_beats_the_recorded_fixed_length(trained: tuple[ControllerReport, Path]) -> None:
    report, path = trained
    assert report.predictor is not None
    assert report.predictor.gain > report.predictor.gain_without
    predictor = load_weights(path).predictor
    assert predictor is not None
    assert predictor.threshold == report.predictor.threshold
    Controller("predictor", 4, load_weights(path))


def test_training_is_repeatable(tmp_path: Path) -> None:
    record_sessions(tmp_path / "r.jsonl", 10, seed=5)
    reports = [train([tmp_path / "r.jsonl"], tmp_path / f"{i}.json", seed=1) for i in range(2)]
    assert reports[0] == reports[1]
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


def test_too_few_rounds_are_refused(tmp_path: Path) -> None:
    record_sessions(tmp_path / "one.jsonl", 1, seed=5, rounds=300)
    record_sessions(tmp_path / "few.jsonl", 3, seed=5, rounds=3)
    for name in ("one.jsonl", "few.jsonl"):
        with pytest.raises(SettingsError, match="too few to train on"):
            train([tmp_path / name], tmp_path / "w.json", seed=0)
    assert not (tmp_path / "w.json").exists()


def test_rounds_without_target_entropy_can_be_trained_on(tmp_path: Path) -> None:
    record_sessions(tmp_path / "r.jsonl", 10, seed=5)
    text = re.sub(r'"target_entropy":[-0-9.e]+,', "", (tmp_path / "r.jsonl").read_text())
    (tmp_path / "r.jsonl").write_text(text)
    report = train([tmp_path / "r.jsonl"], tmp_path / "w.json", seed=0)
    assert "+ target_entropy" not in [trial.name for trial in source(report, "hidden").trials]


# The classifiers


def test_auc_is_the_chance_of_the_right_order() -> None:
    accepted = np.array([True, False, True, False])
    assert classifiers.auc(accepted, np.array([0.9, 0.1, 0.8, 0.2])) == 1
    assert classifiers.auc(accepted, np.array([0.5, 0.5, 0.5, 0.5])) == 0.5
    assert classifiers.auc(accepted, np.array([0.9, 0.5, 0.3, 0.1])) == 0.75
    assert math.isnan(classifiers.auc(np.array([True]), np.array([0.5])))


def test_the_perceptron_learns_a_law_that_is_not_linear() -> None:
    rng = np.random.default_rng(0)
    rows = np.full((3000, len(NAMES)), np.nan)
    rows[:, :2] = rng.normal(size=(3000, 2))
    accepted = rows[:, 0] * rows[:, 1] > 0
    names = ["confidence", "entropy"]
    line = classifiers.predict(classifiers.fit_logistic(rows, accepted, names), rows)
    network = classifiers.predict(classifiers.fit_perceptron(rows, accepted, names, seed=0), rows)
    assert classifiers.auc(accepted, line) < 0.6
    assert classifiers.auc(accepted, network) > 0.97


def test_live_models_and_training_predict_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, len(NAMES)))
    rows[::7, NAMES.index("target_entropy")] = np.nan
    accepted = rng.random(400) < 0.5
    names = ["confidence", "target_entropy", "recent"]
    for model in (
        classifiers.fit_logistic(rows, accepted, names),
        classifiers.fit_perceptron(rows, accepted, names, seed=0),
    ):
        live = [sigmoid(model.logit(tuple(None if math.isnan(v) else float(v) for v in row))) for row in rows]
        assert live == pytest.approx(classifiers.predict(model, rows).tolist())


# The command


def test_the_command_prints_the_figures(tmp_path: Path) -> None:
    record_sessions(tmp_path / "r.jsonl", 12, seed=5)
    out = tmp_path / "w.json"
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "r.jsonl"), "--out", str(out), "--seed", "1"])
    assert shown.exit_code == 0, shown.output
    for part in (
        "360 rounds of 12 sessions",
        "hidden:",
        "+ agreed",
        "MLP of all",
        "calibration error",
        "predictor: AUC",
    ):
        assert part in shown.output
    assert load_weights(out).acceptance.keys() == {"hidden", "lookup"}


def test_the_command_fails_on_a_file_that_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("nonsense\n")
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "w.json")])
    assert shown.exit_code == 1
