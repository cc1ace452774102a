"""Options of `wisp bench load`, in the groups of its `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.tools.bench.load.point_options import ARMS_PANEL, sessions_option
from services.tools.bench.support.options import RESULTS_PANEL
from services.tools.cli.shared_options import MODEL_PANEL

SESSIONS = "2,4,8,16"
REQUESTS_PANEL = "Requests"
SERVER_PANEL = "A server that runs already"
TWIN_PANEL = "Emulated hardware"
CROSSOVER_PANEL = "Crossover of drafts and plain decoding"

SessionsOption = Annotated[str | None, sessions_option(SESSIONS)]
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
    int, typer.Option(min=1024, help="KV budget of the target, in tokens.", rich_help_panel=MODEL_PANEL)
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
