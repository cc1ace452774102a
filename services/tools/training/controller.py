"""Training of the speculation controller: fits models of acceptance to recorded rounds and rates each feature.

Examples are the tokens whose predecessors were all accepted. Over all drafted tokens the figures look better, but
mostly reflect the position. Record the rounds with the rule `fixed`: a rule that drops unlikely tokens records none of
them. All figures are out of fold: a model is measured on sessions that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.drafter.control.features import NAMES, RecentAcceptance, RoundContext, features
from services.drafter.control.records import RoundRecord
from services.drafter.control.weights import ControlWeights, Logistic, Predictor
from services.drafter.control_files import read_records, save_weights
from services.tools.training import classifiers
from services.tools.training.classifiers import Array, Bin, Labels
from shared.errors import SettingsError

WISP_FEATURES = ("confidence", "entropy", "margin", "spread", "position")
FOLDS = 5
FEWEST = 200
"""Examples that a draft source needs to be trained."""
DRAFT_COST, TOKEN_COST = 0.1, 0.025
"""Time of a draft step and of verifying one more token, in units of a round without a draft: 3.4 and 0.9 ms of 36 ms
(SmolLM2-135M on one core, `wisp bench draft`)."""
THRESHOLDS = np.linspace(0.05, 0.95, 19)


@dataclass(frozen=True)
class Trial:
    """A set of features and its figures, out of fold."""

    name: str
    auc: float
    log_loss: float
    """Mean, in nats per token."""
    kept: bool | None = None
    """True if the addition helped; None for a set that is only a comparison."""


@dataclass(frozen=True)
class SourceReport:
    """Figures of one draft source."""

    source: str
    tokens: int
    acceptance: float
    trials: list[Trial]
    error_before: float
    """Expected calibration error of the draft's own confidence; for copied tokens, of the mean acceptance."""
    error_after: float
    reliability: list[Bin]


@dataclass(frozen=True)
class PredictorReport:
    """The predictor's threshold, and its gain on the recorded rounds."""

    auc: float
    threshold: float
    gain: float
    """Tokens per target step with the predictor."""
    gain_without: float
    """Tokens per target step with the recorded drafts."""


@dataclass(frozen=True)
class ControllerReport:
    """Figures of a training."""

    rounds: int
    sessions: int
    sources: list[SourceReport]
    predictor: PredictorReport | None


@dataclass(frozen=True)
class _Examples:
    rows: Array
    accepted: Labels
    sources: NDArray[np.str_]
    sessions: NDArray[np.int64]
    rounds: NDArray[np.int64]

    def part(self, chosen: Labels) -> _Examples:
        return _Examples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def train(
    paths: Sequence[Path],
    out: Path,
    seed: int,
    *,
    draft_cost: float = DRAFT_COST,
    token_cost: float = TOKEN_COST,
) -> ControllerReport:
    """Train on the rounds in these files and write the weights to `out`.

    draft_cost, token_cost: time of a draft step and of verifying a token, in units of a round without a draft. Only
    the predictor's threshold depends on them. Raises SettingsError if a file is unreadable or there are too few tokens.
    """
    recorded = [record for path in paths for record in read_records(path)]
    examples = _examples(recorded)
    count = len(set(examples.sessions.tolist()))
    if count < 2 or len(examples.rows) < FEWEST:
        raise SettingsError(
            f"{len(examples.rows)} verified tokens of {count} sessions are too few to train on; record at least "
            f"{FEWEST} tokens of 2 sessions, better of a hundred"
        )
    models: dict[str, Logistic] = {}
    reports = []
    for source in sorted(set(examples.sources.tolist())):
        of_source = examples.part(examples.sources == source)
        if _trainable(of_source):
            models[source], report = _train_source(source, of_source, seed)
            reports.append(report)
    if not reports:
        raise SettingsError(f"no draft source has {FEWEST} tokens, accepted and rejected ones, of 2 sessions")
    drafted = examples.part(examples.rows[:, NAMES.index("support")] == 0)
    predictor = found = None
    if _trainable(drafted):
        predictor, found = _train_predictor(recorded, drafted, seed, draft_cost, token_cost)
    save_weights(out, ControlWeights(acceptance=models, predictor=predictor))
    return ControllerReport(len(recorded), count, reports, found)


def _trainable(examples: _Examples) -> bool:
    sessions = len(np.unique(examples.sessions))
    return len(examples.rows) >= FEWEST and sessions >= 2 and 0 < examples.accepted.mean() < 1


def _examples(recorded: Iterable[RoundRecord]) -> _Examples:
    rows, accepted, sources, sessions, places = [], [], [], [], []
    numbers: dict[str, int] = {}
    recents: dict[str, RecentAcceptance] = {}
    for place, record in enumerate(recorded):
        number = numbers.setdefault(record.session, len(numbers))
        recent = recents.setdefault(record.session, RecentAcceptance())
        context = RoundContext(record.temperature, record.target_entropy, recent.value)
        for i, guess in enumerate(record.guesses[: min(record.verified, record.accepted + 1)]):
            rows.append([np.nan if value is None else value for value in features(guess, i, context)])
            accepted.append(i < record.accepted)
            sources.append(guess.source)
            sessions.append(number)
            places.append(place)
            recent.learn(i < record.accepted)
    return _Examples(
        np.array(rows, dtype=np.float64).reshape(-1, len(NAMES)),
        np.array(accepted, dtype=np.bool_),
        np.array(sources, dtype=np.str_),
        np.array(sessions, dtype=np.int64),
        np.array(places, dtype=np.int64),
    )


def _train_source(source: str, examples: _Examples, seed: int) -> tuple[Logistic, SourceReport]:
    """Add features one by one; keep each that lowers the loss by more than two standard errors over sessions."""
    rows, accepted = examples.rows, examples.accepted
    fold = _folds(examples.sessions, seed)
    copied = bool((rows[:, NAMES.index("support")] > 0).any())
    useful = [name for i, name in enumerate(NAMES) if _varies(rows[:, i])]
    first = "support" if copied else "confidence"
    kept = [first] if first in useful else []
    predicted = _out_of_fold(rows, accepted, kept, fold)
    trials = [_trial(first, accepted, predicted, kept=bool(kept))]
    for name in useful:
        if name in kept:
            continue
        with_it = _out_of_fold(rows, accepted, [*kept, name], fold)
        gain = classifiers.log_losses(accepted, predicted) - classifiers.log_losses(accepted, with_it)
        helps = _clearly_positive(gain, examples.sessions)
        trials.append(_trial(f"+ {name}", accepted, with_it, helps))
        if helps:
            kept.append(name)
            predicted = with_it
    trials.append(_trial("all", accepted, _out_of_fold(rows, accepted, useful, fold)))
    networks = {"MLP of all": useful} if copied else {"MLP of WISP's five": _wisp_features(rows), "MLP of all": useful}
    for name, names in networks.items():
        fit = partial(classifiers.fit_perceptron, names=names, seed=seed)
        trials.append(_trial(name, accepted, classifiers.cross_fitted(fit, rows, accepted, fold)))
    before = np.full(len(rows), accepted.mean()) if copied else 1 / (1 + np.exp(-rows[:, NAMES.index("confidence")]))
    report = SourceReport(
        source=source,
        tokens=len(rows),
        acceptance=float(accepted.mean()),
        trials=trials,
        error_before=classifiers.calibration_error(accepted, np.nan_to_num(before, nan=0.5)),
        error_after=classifiers.calibration_error(accepted, predicted),
        reliability=classifiers.reliability(accepted, predicted),
    )
    return classifiers.fit_logistic(rows, accepted, kept), report


def _out_of_fold(rows: Array, accepted: Labels, names: Sequence[str], fold: NDArray[np.int64]) -> Array:
    return classifiers.cross_fitted(partial(classifiers.fit_logistic, names=names), rows, accepted, fold)


def _trial(name: str, accepted: Labels, predicted: Array, kept: bool | None = None) -> Trial:
    loss = float(classifiers.log_losses(accepted, predicted).mean())
    return Trial(name, classifiers.auc(accepted, predicted), loss, kept)


def _wisp_features(rows: Array) -> list[str]:
    return [name for name in WISP_FEATURES if _varies(rows[:, NAMES.index(name)])] or ["confidence"]


def _varies(column: Array) -> bool:
    known = column[~np.isnan(column)]
    return len(known) > 0 and float(known.std()) > 1e-6


def _clearly_positive(gain: Array, sessions: NDArray[np.int64]) -> bool:
    """Return whether a sum over tokens is above 0 by more than two standard errors of its sums over sessions."""
    sums = np.bincount(sessions, weights=gain)
    sums = sums[np.bincount(sessions) > 0]
    return float(sums.sum()) > 2 * float(sums.std(ddof=1)) * float(np.sqrt(len(sums)))


def _folds(sessions: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    names = np.random.default_rng(seed).permutation(np.unique(sessions))
    fold = {int(name): i % min(FOLDS, len(names)) for i, name in enumerate(names)}
    return np.array([fold[int(session)] for session in sessions], dtype=np.int64)


def _train_predictor(
    recorded: Sequence[RoundRecord], examples: _Examples, seed: int, draft_cost: float, token_cost: float
) -> tuple[Predictor, PredictorReport]:
    """Train WISP's predictor, with the threshold that maximises the tokens per time of the recorded rounds."""
    names = _wisp_features(examples.rows)
    fit = partial(classifiers.fit_perceptron, names=names, seed=seed)
    predicted = classifiers.cross_fitted(fit, examples.rows, examples.accepted, _folds(examples.sessions, seed))
    costs = (draft_cost, token_cost)
    gains = [_gain(recorded, examples, predicted, float(t), *costs) for t in THRESHOLDS]
    best = int(np.argmax(gains))
    found = PredictorReport(
        auc=classifiers.auc(examples.accepted, predicted),
        threshold=float(THRESHOLDS[best]),
        gain=gains[best],
        gain_without=_gain(recorded, examples, predicted, 1.0, *costs),
    )
    network = classifiers.fit_perceptron(examples.rows, examples.accepted, names, seed)
    return Predictor(network=network, threshold=found.threshold), found


def _gain(
    recorded: Sequence[RoundRecord],
    examples: _Examples,
    predicted: Array,
    threshold: float,
    draft_cost: float,
    token_cost: float,
) -> float:
    """Return the tokens per target step if drafts ended before the first token more likely rejected than `threshold`.

    Counts the rounds whose every token came from a model; 0 without such rounds. The outcome of tokens after a
    rejection is unknown. They count as kept, since only their cost matters: a rule that let the rejected token pass
    pays for them.
    """
    starts = np.flatnonzero(np.r_[True, np.diff(examples.rounds) != 0])
    tokens = time = 0.0
    for start, end in zip(starts, [*starts[1:], len(examples.rounds)], strict=True):
        record = recorded[int(examples.rounds[start])]
        if any(guess.support for guess in record.guesses):
            continue
        stops = np.flatnonzero(1 - predicted[start:end] > threshold)
        length = int(stops[0]) if len(stops) else record.verified
        tokens += 1 + min(length, record.accepted)
        time += 1 + draft_cost * (length + bool(len(stops))) + token_cost * length
    return tokens / time if time else 0.0
