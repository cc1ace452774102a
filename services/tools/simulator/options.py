"""Options of `wisp simulate`, in the groups of its `--help`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.tools.bench.load.arms import NAMES
from services.tools.simulator.arms import SCENARIOS, shipped

SESSIONS = "8,16,32,64"
MOST_SESSIONS = 4095
MOST_S = 1e6
"""Longest phase of a point, in virtual seconds."""
ARMS_PANEL = "Arms and points"
SEARCH_PANEL = "Search for the capacity"
TIME_PANEL = "Length of a point"
SCENARIO_PANEL = "Scenario"
RESULTS_PANEL = "Results"

ScenarioArgument = Annotated[
    str, typer.Argument(help=f"YAML file, or one of {', '.join(shipped(SCENARIOS, '.yaml'))}.")
]
ArmsOption = Annotated[
    str,
    typer.Option(
        help=f"Some of {', '.join(NAMES)}; wisp+/trimming,price leaves these parts out.", rich_help_panel=ARMS_PANEL
    ),
]
SessionsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Numbers of devices to simulate. \\[default: {SESSIONS}; with --search: none]",
        rich_help_panel=ARMS_PANEL,
    ),
]
SearchOption = Annotated[
    bool,
    typer.Option(
        "--search",
        help="Search for the capacity: the most devices whose requests attain.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
FirstOption = Annotated[
    int, typer.Option(min=1, help="Devices at which a search starts.", rich_help_panel=SEARCH_PANEL)
]
MostOption = Annotated[
    int, typer.Option(min=1, max=MOST_SESSIONS, help="Most devices of a search.", rich_help_panel=SEARCH_PANEL)
]
ToleranceOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Resolution of a search, as a share of the capacity.", rich_help_panel=SEARCH_PANEL
    ),
]
RepeatOption = Annotated[
    int, typer.Option(min=1, help="Runs of each point, each with a seed of its own.", rich_help_panel=ARMS_PANEL)
]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of the first run of each point.", rich_help_panel=ARMS_PANEL)
]
WarmUpOption = Annotated[
    float,
    typer.Option(min=0, max=MOST_S, help="Virtual seconds of load before the window.", rich_help_panel=TIME_PANEL),
]
MeasuredOption = Annotated[
    float,
    typer.Option(
        "--measure", min=1, max=MOST_S, help="Virtual seconds in which requests count.", rich_help_panel=TIME_PANEL
    ),
]
DrainOption = Annotated[
    float,
    typer.Option(
        min=0, max=MOST_S, help="Longest wait for these requests, in virtual seconds.", rich_help_panel=TIME_PANEL
    ),
]
SweptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        help="Search at each value: --sweep acceptance.mean=0.5,0.9. Twice makes a map.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
AdviseOption = Annotated[
    bool, typer.Option("--advise", help="Search, and recommend a way of serving.", rich_help_panel=SEARCH_PANEL)
]
ChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Replace a field: --set acceptance.mean=0.6. Repeatable.", rich_help_panel=SCENARIO_PANEL
    ),
]
PrintScenarioOption = Annotated[
    bool, typer.Option("--print", help="Print the scenario's file and exit.", rich_help_panel=SCENARIO_PANEL)
]
ProcessesOption = Annotated[
    int, typer.Option(min=0, help="Points at a time; 0 takes all cores.", rich_help_panel=ARMS_PANEL)
]
NameOption = Annotated[
    str, typer.Option(help="Name of the result files in .wisp/results.", rich_help_panel=RESULTS_PANEL)
]
