"""Options of `wisp simulate`, in the groups of its `--help`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.tools.bench.load.point_options import ARMS_PANEL, SEARCH_PANEL, sessions_option
from services.tools.simulator.arms import SCENARIOS, shipped

SESSIONS = "8,16,32,64"
SCENARIO_PANEL = "Scenario"

ScenarioArgument = Annotated[
    str, typer.Argument(help=f"YAML file, or one of {', '.join(shipped(SCENARIOS, '.yaml'))}.")
]
SessionsOption = Annotated[str | None, sessions_option(SESSIONS)]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of the first run of each point.", rich_help_panel=ARMS_PANEL)
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
