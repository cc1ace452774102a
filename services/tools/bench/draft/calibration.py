"""Calibration of the expected acceptance of draft tokens: figures and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from services.tools.training.classifiers import auc, calibration_error, reliability
from services.tools.training.evaluate import Drafted


def outcomes(drafted: Sequence[Drafted]) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected acceptance of every token whose predecessors were accepted, and whether it was accepted."""
    expected, accepted = [], []
    for one in drafted:
        for i, chance in enumerate(one.acceptance[: one.accepted + 1]):
            expected.append(chance)
            accepted.append(i < one.accepted)
    return np.array(expected), np.array(accepted, dtype=np.bool_)


def figures(drafted: Sequence[Drafted]) -> tuple[float, float, int]:
    """Return AUC, expected calibration error, and the number of tokens."""
    expected, accepted = outcomes(drafted)
    return auc(accepted, expected), calibration_error(accepted, expected), len(expected)


def plot(arms: Mapping[str, Sequence[Drafted]], path: Path) -> None:
    """Plot accepted against expected share, a line per arm, above a histogram of the tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (axes, counts) = pyplot.subplots(
        2, 1, figsize=(5, 5.5), sharex=True, height_ratios=(4, 1), constrained_layout=True
    )
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfectly calibrated")
    for name, drafted in arms.items():
        expected, accepted = outcomes(drafted)
        bins = reliability(accepted, expected)
        _, error, _ = figures(drafted)
        axes.plot(
            [b.predicted for b in bins],
            [b.accepted for b in bins],
            marker="o",
            markersize=4,
            label=f"{name} (error {error:.3f})",
        )
        counts.hist(expected, bins=20, range=(0, 1), histtype="step")
    axes.set_ylabel("accepted share")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    counts.set_xlabel("expected acceptance")
    counts.set_ylabel("tokens")
    counts.set_xlim(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
