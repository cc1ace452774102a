"""Models of acceptance: fits them with numpy and scipy, and measures them.

A row is a token; a column is a feature, NaN where it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import rankdata

from services.drafter.control.features import NAMES
from services.drafter.control.weights import INPUT_BOUND, Inputs, Logistic, Perceptron

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]
Model = Logistic | Perceptron
Fit = Callable[[Array, Labels], Model]

RIDGE = 1.0
"""Prior precision of a logistic weight, on standardised inputs."""
HIDDEN = 16
DECAY = 10.0
"""Prior precision of a perceptron's weight."""
ITERATIONS = 200
BINS = 10


def fit_logistic(rows: Array, accepted: Labels, names: Sequence[str]) -> Logistic:
    """Fit a logistic regression on the named columns, with a small ridge."""
    inputs = _inputs(rows, names)
    x, y = _standardised(inputs, rows), accepted.astype(np.float64)

    def loss(theta: Array) -> tuple[float, Array]:
        z = x @ theta[1:] + theta[0]
        error = _sigmoid(z) - y
        gradient = np.concatenate([[error.sum()], x.T @ error + RIDGE * theta[1:]])
        return float(_losses(z, y).sum() + RIDGE / 2 * theta[1:] @ theta[1:]), gradient

    theta = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return Logistic(inputs=inputs, weights=theta[1:].tolist(), bias=float(theta[0]))


def fit_perceptron(rows: Array, accepted: Labels, names: Sequence[str], seed: int) -> Perceptron:
    """Fit a network with one hidden layer of `HIDDEN` tanh units, by full-batch L-BFGS."""
    inputs = _inputs(rows, names)
    x, y = _standardised(inputs, rows), accepted.astype(np.float64)
    count, size = x.shape
    decay = DECAY / count

    def parts(theta: Array) -> tuple[Array, Array, Array, float]:
        cut = HIDDEN * size
        return theta[:cut].reshape(HIDDEN, size), theta[cut : cut + HIDDEN], theta[cut + HIDDEN : -1], float(theta[-1])

    def loss(theta: Array) -> tuple[float, Array]:
        hidden, hidden_bias, weights, bias = parts(theta)
        units = np.tanh(x @ hidden.T + hidden_bias)
        z = units @ weights + bias
        error = (_sigmoid(z) - y) / count
        back = np.outer(error, weights) * (1 - units**2)
        gradient = np.concatenate([(back.T @ x).ravel(), back.sum(0), units.T @ error, [error.sum()]])
        return float(_losses(z, y).mean() + decay / 2 * theta @ theta), gradient + decay * theta

    start = np.random.default_rng(seed).normal(0, 1 / np.sqrt(size), HIDDEN * (size + 2) + 1)
    theta = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x
    hidden, hidden_bias, weights, bias = parts(theta)
    return Perceptron(
        inputs=inputs,
        hidden=hidden.tolist(),
        hidden_bias=hidden_bias.tolist(),
        weights=weights.tolist(),
        bias=bias,
    )


def predict(model: Model, rows: Array) -> Array:
    """Return the predicted acceptance of every row."""
    x = _standardised(model.inputs, rows)
    if isinstance(model, Perceptron):
        x = np.tanh(x @ np.array(model.hidden).T + np.array(model.hidden_bias))
    return _sigmoid(x @ np.array(model.weights) + model.bias)


def cross_fitted(fit: Fit, rows: Array, accepted: Labels, fold: NDArray[np.int64]) -> Array:
    """Return the predicted acceptance of every row, by a model fitted on the other folds."""
    predicted = np.empty(len(rows))
    for k in np.unique(fold):
        held = fold == k
        predicted[held] = predict(fit(rows[~held], accepted[~held]), rows[held])
    return predicted


def auc(accepted: Labels, predicted: Array) -> float:
    """Return the chance that an accepted token ranks above a rejected one; NaN without tokens of both kinds."""
    positive = int(accepted.sum())
    negative = len(accepted) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(predicted)
    return float((ranks[accepted].sum() - positive * (positive + 1) / 2) / (positive * negative))


def log_losses(accepted: Labels, predicted: Array) -> Array:
    """Return -log of the probability predicted for each outcome, in nats."""
    return -np.log(np.clip(np.where(accepted, predicted, 1 - predicted), 1e-9, 1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Bin:
    """Tokens of similar predicted acceptance."""

    predicted: float
    accepted: float
    tokens: int


def reliability(accepted: Labels, predicted: Array) -> list[Bin]:
    """Return `BINS` bins of equally many tokens, by rising prediction."""
    order = np.argsort(predicted, kind="stable")
    return [
        Bin(float(predicted[part].mean()), float(accepted[part].mean()), len(part))
        for part in np.array_split(order, BINS)
        if len(part)
    ]


def calibration_error(accepted: Labels, predicted: Array) -> float:
    """Return the expected calibration error: mean distance of predicted and actual acceptance over the bins."""
    bins = reliability(accepted, predicted)
    return sum(b.tokens * abs(b.predicted - b.accepted) for b in bins) / len(accepted)


def _inputs(rows: Array, names: Sequence[str]) -> Inputs:
    columns = rows[:, [NAMES.index(name) for name in names]]
    known = ~np.isnan(columns)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, columns, 0).sum(0) / count
    scale = np.sqrt((np.where(known, columns - mean, 0) ** 2).sum(0) / count)
    return Inputs(features=list(names), mean=mean.tolist(), scale=np.where(scale > 1e-6, scale, 1.0).tolist())


def _standardised(inputs: Inputs, rows: Array) -> Array:
    columns = rows[:, [NAMES.index(name) for name in inputs.features]]
    x = (columns - np.array(inputs.mean)) / np.array(inputs.scale)
    return np.clip(np.nan_to_num(x, nan=0.0), -INPUT_BOUND, INPUT_BOUND)  # type: ignore[no-any-return]


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(z / 2))


def _losses(z: Array, y: Array) -> Array:
    return np.logaddexp(0, z) - y * z
