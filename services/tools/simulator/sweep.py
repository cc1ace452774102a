"""Sweeps: capacities over the values of one field of a scenario, or over two as a map. Each cell is a campaign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from services.tools.bench.load.core.results import LoadResults, Row
from services.tools.bench.load.plot import COLOURS, GREY, MARKERS
from services.tools.local.progress import Progress
from services.tools.simulator.campaign import AIM, SimulationCampaign, SimulationPlan
from services.tools.simulator.core.scenario import parse_scenario
from shared.errors import SettingsError

OURS = "wisp+"
CENTRAL = ("centralized", "colocated")
"""The arms whose best one `OURS` is compared with."""


@dataclass(frozen=True)
class SweptField:
    """A field of the scenario, and the values to set it to."""

    path: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class SweepCell:
    """The results at one value of each field."""

    changes: dict[str, float]
    results: LoadResults

    def capacity(self, arm: str) -> int:
        """Return an arm's capacity; 0 if it holds nothing."""
        return self.results.capacities()[arm][0].sessions

    @property
    def gain(self) -> float | None:
        """Capacity of `OURS` as a share of the best centrally serving arm's; None without both, or if all are 0."""
        central = [self.capacity(arm) for arm in CENTRAL if arm in self.results.arms]
        if OURS not in self.results.arms or not central:
            return None
        ours = self.capacity(OURS)
        return ours / max(central) if max(central) else (float("inf") if ours else None)


def swept_fields(texts: Sequence[str]) -> list[SweptField]:
    """Parse `field=value,value,…` texts, at most two. Raises SettingsError."""
    found = []
    for text in texts:
        path, _, values = text.partition("=")
        try:
            numbers = tuple(float(value) for value in values.split(",") if value.strip())
        except ValueError as error:
            raise SettingsError(f"--sweep {path}: {error}; it takes numbers") from error
        if not path.strip() or not numbers:
            raise SettingsError(f"--sweep takes field=value,value, such as acceptance.mean=0.6,0.9 (given: {text!r})")
        found.append(SweptField(path.strip(), numbers))
    if len(found) > 2:
        raise SettingsError("a sweep has one field, or two for a map")
    return found


def sweep(
    fields: Sequence[SweptField],
    plan: SimulationPlan,
    text: str,
    name: str,
    changes: dict[str, Any],
    pool: Executor,
    progress: Progress,
) -> Iterator[SweepCell]:
    """Run the plan for each combination of values. text, name: of the scenario's file. Raises SettingsError."""
    combinations = product(*(field.values for field in fields))
    cells = [dict(zip([field.path for field in fields], values, strict=True)) for values in combinations]
    specs = [parse_scenario(text, name, {**changes, **cell}) for cell in cells]
    for cell, spec in zip(cells, specs, strict=True):
        campaign = SimulationCampaign(replace(plan, scenario=spec), progress)
        campaign.run(pool)
        yield SweepCell(cell, campaign.results)


def sweep_table(cells: Sequence[SweepCell], arms: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Return columns and rows: capacity and highest goodput of each arm in each cell, and the gain of `OURS`."""
    columns = [*cells[0].changes, *(f"{arm} holds" for arm in arms), *(f"{arm} goodput" for arm in arms), "gain"]
    rows: list[Row] = [
        [
            *cell.changes.values(),
            *(cell.capacity(arm) for arm in arms),
            *(cell.results.most_goodput(arm)[1] for arm in arms),
            cell.gain,
        ]
        for cell in cells
    ]
    return columns, rows


def plot_sweep(cells: Sequence[SweepCell], fields: Sequence[SweptField], arms: Sequence[str], path: Path) -> None:
    """Write a picture: capacities over the values of one field, or a map of the gain over two."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with pyplot.rc_context({"svg.fonttype": "none", **dict.fromkeys(keys, GREY)}):  # type: ignore[arg-type]
        figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
        if len(fields) == 1:
            _draw_lines(axes, cells, fields[0], arms)
        else:
            _draw_map(axes, cells, fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True)
        pyplot.close(figure)


def _draw_lines(axes: Any, cells: Sequence[SweepCell], field: SweptField, arms: Sequence[str]) -> None:
    values = [cell.changes[field.path] for cell in cells]
    for number, arm in enumerate(arms):
        axes.plot(
            values,
            [cell.capacity(arm) for cell in cells],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=arm,
        )
    axes.set_xlabel(field.path)
    axes.set_ylabel(f"sessions at which {AIM:.0%} attain")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_map(axes: Any, cells: Sequence[SweepCell], fields: Sequence[SweptField]) -> None:
    across, up = fields
    grid = [[float("nan")] * len(across.values) for _ in up.values]
    for cell in cells:
        column, row = across.values.index(cell.changes[across.path]), up.values.index(cell.changes[up.path])
        gain = cell.gain
        shown = "none hold" if gain is None else "only ours" if gain == float("inf") else f"{gain:.2f}"
        grid[row][column] = min(2.0, gain) if gain is not None else float("nan")
        axes.text(column, row, shown, ha="center", va="center", color="black", fontsize=9)
    axes.imshow(grid, origin="lower", aspect="auto", cmap="RdYlGn", vmin=0.0, vmax=2.0)
    axes.set_xticks(range(len(across.values)), [f"{value:g}" for value in across.values])
    axes.set_yticks(range(len(up.values)), [f"{value:g}" for value in up.values])
    axes.set_xlabel(across.path)
    axes.set_ylabel(up.path)
    axes.set_title(f"capacity of {OURS} / best of {' and '.join(CENTRAL)}", fontsize=10)
