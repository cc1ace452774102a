"""`wisp simulate`: a fleet in virtual time, with the suite's own deciding code and a target profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from services.tools.bench.load.arms import NAMES, arms_of
from services.tools.bench.load.campaign import CapacitySearch
from services.tools.bench.load.core.measures import Window
from services.tools.bench.support.options import whole_numbers
from services.tools.bench.support.report import terminal
from services.tools.cli.program import Program
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress
from services.tools.simulator.arms import SCENARIOS, hardware_of, read, shipped
from services.tools.simulator.campaign import SimulationCampaign, SimulationPlan, worker_processes
from services.tools.simulator.core.bounds import scenario_bounds
from services.tools.simulator.core.scenario import parse_scenario
from services.tools.simulator.output import SimulationOutput, advice
from services.tools.simulator.sweep import SweepCell, sweep, swept_fields
from shared.errors import SettingsError

ARMS = "centralized,colocated,sled,fcfs,edf,wisp,wisp+"
ADVISED = "centralized,colocated,wisp+"
"""Arms of `--advise`."""
SESSIONS = "8,16,32,64"
MOST_SESSIONS = 4095
MOST_S = 1e6
"""Longest phase of a point, in virtual seconds."""


ARMS_PANEL = "Arms and points"
SEARCH_PANEL = "Search for the capacity"
TIME_PANEL = "Length of a point"
SCENARIO_PANEL = "Scenario"
RESULTS_PANEL = "Results"

app = Program()


@app.command()
def main(
    scenario: Annotated[
        str, typer.Argument(help=f"YAML file, or one of {', '.join(shipped(SCENARIOS, '.yaml'))}.")
    ] = "paper-a100",
    arms: Annotated[
        str,
        typer.Option(
            help=f"Some of {', '.join(NAMES)}; wisp+/trimming,price leaves these parts out.", rich_help_panel=ARMS_PANEL
        ),
    ] = ARMS,
    sessions: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of devices to simulate. \\[default: {SESSIONS}; with --search: none]",
            rich_help_panel=ARMS_PANEL,
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Search for the capacity: the most devices whose requests attain.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = False,
    first: Annotated[
        int, typer.Option(min=1, help="Devices at which a search starts.", rich_help_panel=SEARCH_PANEL)
    ] = 8,
    most: Annotated[
        int, typer.Option(min=1, max=MOST_SESSIONS, help="Most devices of a search.", rich_help_panel=SEARCH_PANEL)
    ] = 512,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Resolution of a search, as a share of the capacity.", rich_help_panel=SEARCH_PANEL
        ),
    ] = 0.05,
    repeat: Annotated[
        int, typer.Option(min=1, help="Runs of each point, each with a seed of its own.", rich_help_panel=ARMS_PANEL)
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first run of each point.", rich_help_panel=ARMS_PANEL)
    ] = 1,
    warm_up: Annotated[
        float,
        typer.Option(min=0, max=MOST_S, help="Virtual seconds of load before the window.", rich_help_panel=TIME_PANEL),
    ] = 20.0,
    measured: Annotated[
        float,
        typer.Option(
            "--measure", min=1, max=MOST_S, help="Virtual seconds in which requests count.", rich_help_panel=TIME_PANEL
        ),
    ] = 60.0,
    drain: Annotated[
        float,
        typer.Option(
            min=0, max=MOST_S, help="Longest wait for these requests, in virtual seconds.", rich_help_panel=TIME_PANEL
        ),
    ] = 30.0,
    swept: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            help="Search at each value: --sweep acceptance.mean=0.5,0.9. Twice makes a map.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Search, and recommend a way of serving.", rich_help_panel=SEARCH_PANEL)
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Replace a field: --set acceptance.mean=0.6. Repeatable.", rich_help_panel=SCENARIO_PANEL
        ),
    ] = None,
    print_scenario: Annotated[
        bool, typer.Option("--print", help="Print the scenario's file and exit.", rich_help_panel=SCENARIO_PANEL)
    ] = False,
    processes: Annotated[
        int, typer.Option(min=0, help="Points at a time; 0 takes all cores.", rich_help_panel=ARMS_PANEL)
    ] = 0,
    name: Annotated[
        str, typer.Option(help="Name of the result files in .wisp/results.", rich_help_panel=RESULTS_PANEL)
    ] = "simulation",
) -> None:
    """Simulate a fleet of devices and verifiers in virtual time, each arm with the same requests."""
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
            arms_of(ADVISED if advise and arms == ARMS else arms),
            whole_numbers("--sessions", sessions or ("" if searched else SESSIONS), 1, MOST_SESSIONS),
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
