"""The output of `wisp simulate`: tables on the terminal, a result file, a picture, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from services.tools.bench.load.core.results import LoadResults, notes
from services.tools.bench.load.plot import plot
from services.tools.bench.load.report import print_tables
from services.tools.bench.support.report import conclude, machine, records, table, written
from services.tools.simulator.campaign import SimulationPlan
from services.tools.simulator.sweep import SweepCell, SweptField, plot_sweep, sweep_table

VIRTUAL = "all times are virtual; nothing here depends on this machine's speed"


@dataclass(frozen=True)
class SimulationOutput:
    """Prints and writes the results of a command."""

    plan: SimulationPlan
    scenario: str
    changes: Mapping[str, Any]
    name: str
    console: Console

    @property
    def _record(self) -> dict[str, Any]:
        facts = {"scenario": self.scenario, "seed": self.plan.seed, "repeats": self.plan.repeats, **self.changes}
        return {
            "title": self.plan.scenario.title,
            "facts": {**facts, **machine()},
            "scenario": self.plan.scenario.model_dump(mode="json"),
        }

    def campaign(self, results: LoadResults) -> None:
        """Print the tables of a campaign and write its files; nothing if no point was simulated."""
        if not results.points:
            return
        print_tables(results, self.console)
        for point in results.points:
            if point.scalings:
                steps = ", ".join(f"{count} at {at_s:.0f} s ({metric})" for at_s, count, metric in point.scalings)
                self.console.print(
                    f"{point.arm}, {point.sessions} sessions, seed {self.plan.seed + point.repeat}: verifiers {steps}",
                    highlight=False,
                    soft_wrap=True,
                )
        record = {
            **self._record,
            "notes": [VIRTUAL, *notes(results, self.plan.search.tolerance if self.plan.search else None)],
            "capacities": {arm: [one.model_dump() for one in found] for arm, found in results.capacities().items()},
            "ratios": results.ratios(),
            "results": results.model_dump(mode="json"),
        }
        path = conclude(self.console, self.name, record)
        picture = path.with_suffix(".svg")
        plot(results, picture)
        written(self.console, picture)

    def sweep(self, fields: Sequence[SweptField], cells: Sequence[SweepCell]) -> None:
        """Print the table of a sweep and write its files; nothing if no cell was simulated."""
        if not cells:
            return
        arms = [arm.name for arm in self.plan.arms]
        columns, rows = sweep_table(cells, arms)
        self.console.print(table("capacity and highest goodput", columns, rows))
        record = {
            **self._record,
            "notes": [VIRTUAL, "gain is the capacity of wisp+ / the best of centralized and colocated"],
            "rows": records(columns, rows),
            "cells": [{"changes": cell.changes, "results": cell.results.model_dump(mode="json")} for cell in cells],
        }
        path = conclude(self.console, self.name, record)
        picture = path.with_suffix(".svg")
        plot_sweep(cells, fields, arms, picture)
        written(self.console, picture)


def advice(results: LoadResults, verifiers: int) -> str:
    """Recommend the arm with the highest capacity, and compare it with the others."""
    capacities = {arm: found[0].sessions for arm, found in results.capacities().items()}
    best = max(capacities, key=lambda arm: capacities[arm])
    if not capacities[best]:
        return "no way of serving holds a single session: the SLO is too tight for this target, or the link too slow"
    others = ", ".join(f"{arm} {held}" for arm, held in capacities.items() if arm != best)
    rivals = f" ({others})" if others else ""
    goodput = results.most_goodput(best)[1]
    return (
        f"choose {best}: {capacities[best] / verifiers:.3g} sessions per verifier{rivals}, and up to "
        f"{goodput / verifiers:.0f} tokens/s per verifier within their SLO"
    )
