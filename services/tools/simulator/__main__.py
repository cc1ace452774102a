"""`wisp simulate`: a fleet in virtual time, with the suite's own deciding code and a target profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from services.tools.bench.load.arms import arms_of
from services.tools.bench.load.campaign import CapacitySearch
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.point_options import (
    ALL_ARMS,
    LARGEST_POINT,
    ArmsOption,
    DrainOption,
    FirstOption,
    MeasuredOption,
    MostOption,
    RepeatOption,
    SearchOption,
    ToleranceOption,
    WarmUpOption,
)
from services.tools.bench.support.options import NameOption, whole_numbers
from services.tools.bench.support.report import terminal
from services.tools.cli.program import Program
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress
from services.tools.simulator.arms import SCENARIOS, hardware_of, read
from services.tools.simulator.campaign import SimulationCampaign, SimulationPlan, worker_processes
from services.tools.simulator.core.bounds import scenario_bounds
from services.tools.simulator.core.scenario import parse_scenario
from services.tools.simulator.options import (
    SESSIONS,
    AdviseOption,
    ChangeOption,
    PrintScenarioOption,
    ProcessesOption,
    ScenarioArgument,
    SeedOption,
    SessionsOption,
    SweptOption,
)
from services.tools.simulator.output import SimulationOutput, advice
from services.tools.simulator.sweep import SweepCell, sweep, swept_fields
from shared.errors import SettingsError

ADVISED = "centralized,colocated,wisp+"
"""Arms of `--advise`."""
app = Program()


@app.command()
def main(
    scenario: ScenarioArgument = "paper-a100",
    arms: ArmsOption = ALL_ARMS,
    sessions: SessionsOption = None,
    search: SearchOption = False,
    first: FirstOption = 8,
    most: MostOption = 512,
    tolerance: ToleranceOption = 0.05,
    repeat: RepeatOption = 1,
    seed: SeedOption = 1,
    warm_up: WarmUpOption = 20.0,
    measured: MeasuredOption = 60.0,
    drain: DrainOption = 30.0,
    swept: SweptOption = None,
    advise: AdviseOption = False,
    change: ChangeOption = None,
    print_scenario: PrintScenarioOption = False,
    processes: ProcessesOption = 0,
    name: NameOption = "simulation",
) -> None:
    """Simulate a fleet in virtual time, each arm with the same requests. Each device has one session."""
    with errors_shown():
        text = read(scenario, SCENARIOS, ".yaml", "scenario")
        if print_scenario:
            print(text, end="")
            return
        changes = _changes(change or [])
        spec = parse_scenario(text, scenario, changes)
        if Path(name).name != name:
            raise SettingsError(f"--name takes a file's name without folders (given: {name!r})")
        fields = swept_fields(swept or [])
        searched = search or advise or bool(fields)
        plan = SimulationPlan(
            spec,
            arms_of(ADVISED if advise and arms == ALL_ARMS else arms),
            whole_numbers("--sessions", sessions or ("" if searched else SESSIONS), 1, LARGEST_POINT),
            CapacitySearch(first, most, tolerance) if searched else None,
            repeat,
            seed,
            Window(warm_up_s=warm_up, measure_s=measured, drain_s=drain),
        )
        console = terminal()
        _introduce(plan, console)
        output = SimulationOutput(plan, scenario, changes, name, console)
        with worker_processes(processes or os.cpu_count() or 1) as pool:
            progress = ConsoleProgress(console)
            if fields:
                cells: list[SweepCell] = []
                try:
                    cells.extend(sweep(fields, plan, text, scenario, changes, pool, progress))
                finally:
                    output.sweep(fields, cells)
                return
            campaign = SimulationCampaign(plan, progress)
            try:
                campaign.run(pool)
            finally:
                output.campaign(campaign.results)
        if advise:
            console.print(advice(campaign.results, spec.verifiers), highlight=False, soft_wrap=True)


def _introduce(plan: SimulationPlan, console: Console) -> None:
    """Print a summary of the scenario, and the bounds that no policy can exceed."""
    spec = plan.scenario
    target = hardware_of(spec).target
    console.print(
        f"{spec.title}; verifiers: {spec.verifiers}, each with room for the KV of {target.kv_tokens:,} tokens",
        highlight=False,
    )
    if (bounds := scenario_bounds(spec, target, plan.seed)) is not None:
        for sentence in bounds.sentences():
            console.print(sentence, highlight=False, soft_wrap=True)


def _changes(texts: list[str]) -> dict[str, Any]:
    """Parse `path=value` texts. Raises SettingsError."""
    changes = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise SettingsError(f"--set takes field=value, such as acceptance.mean=0.6 (given: {text!r})")
        try:
            changes[path.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SettingsError(f"--set {path}: the value {value!r} is not YAML") from error
    return changes


if __name__ == "__main__":
    app(prog_name="wisp simulate")
