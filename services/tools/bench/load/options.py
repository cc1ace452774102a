"""Options of `wisp bench load`, in the groups of its `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.tools.bench.load.arms import NAMES
from services.tools.bench.load.core.requests import MOST_SESSIONS
from services.tools.bench.support.options import TARGET_PANEL

SESSIONS = "2,4,8,16"
ARMS_PANEL = "Arms and points"
SEARCH_PANEL = "Search for the capacity"
TIME_PANEL = "Length of a point"
REQUESTS_PANEL = "Requests"
SERVER_PANEL = "A server that runs already"
TWIN_PANEL = "Emulated hardware"
CROSSOVER_PANEL = "Crossover of drafts and plain decoding"
RESULTS_PANEL = "Results"

ArmsOption = Annotated[
    str,
    typer.Option(
        help=f"Some of {', '.join(NAMES)}; wisp+/trimming,price leaves these parts out.", rich_help_panel=ARMS_PANEL
    ),
]
SessionsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Numbers of sessions to measure. \\[default: {SESSIONS}; with --search: none]",
        rich_help_panel=ARMS_PANEL,
    ),
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
    int, typer.Option(min=1, max=MOST_SESSIONS - 1, help="Most sessions of a search.", rich_help_panel=SEARCH_PANEL)
]
ToleranceOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Resolution of a search, as a share of the capacity.", rich_help_panel=SEARCH_PANEL
    ),
]
RepeatOption = Annotated[
    int, typer.Option(min=1, help="Measurements of each number of sessions.", rich_help_panel=ARMS_PANEL)
]
WarmUpOption = Annotated[
    float, typer.Option(min=0, help="Seconds of load before the window.", rich_help_panel=TIME_PANEL)
]
MeasuredOption = Annotated[
    float, typer.Option("--measure", min=1, help="Seconds in which requests count.", rich_help_panel=TIME_PANEL)
]
DrainOption = Annotated[
    float, typer.Option(min=0, help="Longest wait for these requests, in seconds.", rich_help_panel=TIME_PANEL)
]
WorkloadOption = Annotated[Path | None, typer.Option(help="TOML file of the workload.", rich_help_panel=REQUESTS_PANEL)]
PrintWorkloadOption = Annotated[
    bool, typer.Option("--print-workload", help="Print the packaged one and exit.", rich_help_panel=REQUESTS_PANEL)
]
SeedOption = Annotated[
    int | None,
    typer.Option(min=0, help="Seed of the requests; overrides the workload's.", rich_help_panel=REQUESTS_PANEL),
]
RequestsOption = Annotated[
    Path | None, typer.Option(help="Take the requests from this JSON-lines file.", rich_help_panel=REQUESTS_PANEL)
]
WriteRequestsOption = Annotated[
    Path | None, typer.Option(help="Write the sent requests to a JSON-lines file.", rich_help_panel=REQUESTS_PANEL)
]
UrlOption = Annotated[
    str | None,
    typer.Option(help="Measure this server instead of a stack; the URL ends in /v1.", rich_help_panel=SERVER_PANEL),
]
PoolsOption = Annotated[
    bool,
    typer.Option(
        "--pools",
        help="With --url: name the drafter pool of its hardware in each request.",
        rich_help_panel=SERVER_PANEL,
    ),
]
AdmissionOption = Annotated[
    bool, typer.Option("--admission", help="Let the suite's gateway refuse requests.", rich_help_panel=ARMS_PANEL)
]
TargetProfileOption = Annotated[
    str | None,
    typer.Option(
        help="Measure the twin of this target profile (a name, or a file of `wisp calibrate`).",
        rich_help_panel=TWIN_PANEL,
    ),
]
AcceptanceOption = Annotated[
    float,
    typer.Option(
        min=0.01, max=0.99, help="Chance of the twin's draft tokens to be accepted.", rich_help_panel=TWIN_PANEL
    ),
]
TraceOption = Annotated[
    str | None,
    typer.Option(help="Trace of the twin, instead of an acceptance (a name, or a file).", rich_help_panel=TWIN_PANEL),
]
CacheTokensOption = Annotated[
    int, typer.Option(min=1024, help="KV budget of the target, in tokens.", rich_help_panel=TARGET_PANEL)
]
NameOption = Annotated[
    str, typer.Option(help="Name of the result files in .wisp/results.", rich_help_panel=RESULTS_PANEL)
]
CrossoverOption = Annotated[
    bool,
    typer.Option(
        "--crossover",
        help="Measure the time per token by number of streams instead, with drafts allowed, none and forced.",
        rich_help_panel=CROSSOVER_PANEL,
    ),
]
TokensOption = Annotated[
    int, typer.Option(min=16, help="Tokens of each stream of --crossover.", rich_help_panel=CROSSOVER_PANEL)
]
AgainOption = Annotated[
    bool,
    typer.Option("--replot", help="Draw the picture of an earlier run again and exit.", rich_help_panel=RESULTS_PANEL),
]
