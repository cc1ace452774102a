"""Plot of attainment and goodput over the number of sessions, a line per arm, for light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from services.tools.bench.load.core.results import LoadResults

GREY = "#7d7d7d"
"""Legible on white and on a dark page, with a contrast of about 4 on both."""
COLOURS = ("#3b82d6", "#d9730d", "#2f9e6e", "#b65fc4", "#c9504a", "#9a8420", "#5f8f9e", "#8a6fd1")
MARKERS = "osD^vPX*"
LABEL_GAP = 0.055
"""Distance of two labels, as a share of the height of the axes."""


def plot(results: LoadResults, path: Path) -> None:
    """Write the picture. The suffix of the name chooses its format."""
    attainments = {arm: [(one.sessions, 100 * one.attainment) for one in results.tried(arm)] for arm in results.arms}
    goodputs = {arm: results.goodput(arm) for arm in results.arms}
    with _figure(path, rows=2, height=8) as (above, below):
        above.axhline(95, color=GREY, linewidth=0.8, linestyle=(0, (4, 4)))
        above.set_ylim(0, 103)
        above.set_ylabel("requests that attained their SLO, % (dashed: 95)")
        below.set_ylabel("goodput, tokens/s of requests that attained")
        below.set_xlabel("sessions")
        _lines(above, attainments)
        _lines(below, goodputs)
        below.set_ylim(bottom=0)
        _sessions(below, sorted({point.sessions for point in results.points}))
        for axes in (above, below):
            _label(axes, attainments if axes is above else goodputs)


@contextmanager
def axes_of(path: Path, x_label: str, y_label: str) -> Iterator[Any]:
    """Yield the axes of a single picture, which is written at the end of the context."""
    with _figure(path, rows=1, height=5) as (axes,):
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        yield axes


@contextmanager
def _figure(path: Path, *, rows: int, height: float) -> Iterator[Sequence[Any]]:
    """Yield axes one above the other with a common x-axis; write them to the file at the end."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": ["sans-serif"],
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        figure, found = pyplot.subplots(
            rows, 1, figsize=(7.5, height), sharex=True, squeeze=False, constrained_layout=True
        )
        yield list(found[:, 0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True)
        pyplot.close(figure)


def spread(wanted: Sequence[float], gap: float, floor: float) -> list[float]:
    """Return positions at least `gap` apart and not below `floor`, in the order of the wanted ones and close to them.

    The sum of squared distances is the least: an isotonic regression (pool adjacent violators) of the wanted positions
    minus the gaps below them.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    fitted = [max(floor, fmean(block)) for block in blocks for _ in block]
    placed = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        placed[i] = fitted[rank] + rank * gap
    return placed


def _lines(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    for i, points in enumerate(lines.values()):
        axes.plot(
            [sessions for sessions, _ in points],
            [value for _, value in points],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
        )


def _label(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Write each line's name at its right end."""
    bottom, top = axes.get_ylim()
    right = max(points[-1][0] for points in lines.values())
    ends = [points[-1][1] for points in lines.values()]
    places = spread(ends, LABEL_GAP * (top - bottom), floor=bottom)
    for i, (arm, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        axes.annotate(
            arm,
            xy=points[-1],
            xytext=(right * 1.06, places[i]),
            textcoords="data",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )


def _sessions(axes: Any, sessions: Sequence[int]) -> None:
    """Make the axis logarithmic, with as many of the measured numbers as fit."""
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    shown: list[int] = []
    for one in sessions:
        if not shown or one >= shown[-1] * 1.19:
            shown.append(one)
    axes.set_xticks(shown, [str(one) for one in shown])
    if len(sessions) > 1:
        axes.set_xlim(sessions[0] / 1.1, sessions[-1] * 1.04)
