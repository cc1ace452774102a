"""Options of the programs that measure points: `wisp bench load`, `scaling` and `twin`, and `wisp simulate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.tools.bench.load.arms import NAMES
from services.tools.bench.load.core.requests import MOST_SESSIONS

ALL_ARMS = "centralized,colocated,sled,fcfs,edf,wisp,wisp+"
LARGEST_POINT = MOST_SESSIONS - 1
"""Most sessions of a point."""
MOST_S = 1e6
"""Longest phase of a point."""
ARMS_PANEL = "Arms and points"
SEARCH_PANEL = "Search for the capacity"
TIME_PANEL = "Length of a point"


def sessions_option(default: str) -> Any:
    """Return `--sessions` with its default without a search, for the help."""
    return typer.Option(
        help=f"Numbers of sessions to measure. \\[default: {default}; with --search: none]", rich_help_panel=ARMS_PANEL
    )


ArmsOption = Annotated[
    str,
    typer.Option(
        help=f"Some of {', '.join(NAMES)}; wisp+/trimming,price leaves these parts out.", rich_help_panel=ARMS_PANEL
    ),
]
RepeatOption = Annotated[
    int, typer.Option(min=1, help="Measurements of each number of sessions.", rich_help_panel=ARMS_PANEL)
]
SearchOption = Annotated[
    bool,
    typer.Option(
        "--search",
        help="Search for the capacity: the most sessions whose requests attain.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
FirstOption = Annotated[
    int, typer.Option(min=1, help="Sessions at which a search starts.", rich_help_panel=SEARCH_PANEL)
]
MostOption = Annotated[
    int, typer.Option(min=1, max=LARGEST_POINT, help="Most sessions of a search.", rich_help_panel=SEARCH_PANEL)
]
ToleranceOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Resolution of a search, as a share of the capacity.", rich_help_panel=SEARCH_PANEL
    ),
]
WarmUpOption = Annotated[
    float, typer.Option(min=0, max=MOST_S, help="Seconds of load before the window.", rich_help_panel=TIME_PANEL)
]
MeasuredOption = Annotated[
    float,
    typer.Option("--measure", min=1, max=MOST_S, help="Seconds in which requests count.", rich_help_panel=TIME_PANEL),
]
DrainOption = Annotated[
    float,
    typer.Option(min=0, max=MOST_S, help="Longest wait for these requests, in seconds.", rich_help_panel=TIME_PANEL),
]
