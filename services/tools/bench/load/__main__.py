"""`wisp bench load`: SLO attainment, goodput and capacity of each way of serving, under sessions over HTTP.

Sessions send requests as any client does (`workload`, `drive`). Each arm (`arms`) gets the same requests at the same
numbers of sessions, on a stack of its own. All arms have one thread for the target, the same cache and the same
hardware profiles. Admission control is off by default, so that a policy shows its own behaviour under load.

The suite's drafters emulate hardware. An arm without drafters only delays each request by the uplink of its hardware
profile (`client`). No arm includes the last part of the way back: text counts when it leaves the gateway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.tools.bench.load.arms import NAMES, arms_of
from services.tools.bench.load.campaign import THREADS, ArmSettings, Campaign, CapacitySearch, LoadPlan
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.requests import MOST_SESSIONS, from_lines, to_lines
from services.tools.bench.load.crossover import SESSIONS as CROSSOVER_SESSIONS
from services.tools.bench.load.crossover import CrossoverBench
from services.tools.bench.load.crossover import workload as crossover_workload
from services.tools.bench.load.report import conclude, replot
from services.tools.bench.load.workload import default_text, workload_of
from services.tools.bench.support.options import (
    TARGET_PANEL,
    DtypeOption,
    TargetOption,
    let_idle_threads_sleep,
    run_program,
    target_folder,
    whole_numbers,
)
from services.tools.bench.support.report import machine, terminal
from services.tools.cli.terminal import INTERRUPTED, errors_shown, run
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_twin
from shared.errors import SettingsError
from shared.models.folder import AUTO, ModelFolder
from shared.twin.layout import is_twin

ARMS = "centralized,colocated,sled,fcfs,edf,wisp,wisp+"
SESSIONS = "2,4,8,16"
NAME = "load"
ARMS_PANEL = "Arms and points"
SEARCH_PANEL = "Search for the capacity"
TIME_PANEL = "Length of a point"
REQUESTS_PANEL = "Requests"
SERVER_PANEL = "A server that runs already"
TWIN_PANEL = "Emulated hardware"
CROSSOVER_PANEL = "Crossover of drafts and plain decoding"
RESULTS_PANEL = "Results"


IGNORED_BY_CROSSOVER = (
    "arms", "first", "most", "tolerance", "repeat", "search", "warm_up", "measured", "drain", "workload", "requests",
    "write_requests", "url", "pools", "target_profile", "acceptance", "trace",
)  # fmt: skip


def main(
    context: typer.Context,
    arms: Annotated[
        str,
        typer.Option(
            help=f"Some of {', '.join(NAMES)}; wisp+/trimming,price leaves these parts out.", rich_help_panel=ARMS_PANEL
        ),
    ] = ARMS,
    sessions: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of sessions to measure. \\[default: {SESSIONS}; with --search: none]",
            rich_help_panel=ARMS_PANEL,
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Search for the capacity: the most sessions whose requests attain.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = False,
    first: Annotated[
        int, typer.Option(min=1, help="Sessions at which a search starts.", rich_help_panel=SEARCH_PANEL)
    ] = 4,
    most: Annotated[
        int, typer.Option(min=1, max=MOST_SESSIONS - 1, help="Most sessions of a search.", rich_help_panel=SEARCH_PANEL)
    ] = 64,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Resolution of a search, as a share of the capacity.", rich_help_panel=SEARCH_PANEL
        ),
    ] = 0.1,
    repeat: Annotated[
        int, typer.Option(min=1, help="Measurements of each number of sessions.", rich_help_panel=ARMS_PANEL)
    ] = 1,
    warm_up: Annotated[
        float, typer.Option(min=0, help="Seconds of load before the window.", rich_help_panel=TIME_PANEL)
    ] = 10.0,
    measured: Annotated[
        float, typer.Option("--measure", min=1, help="Seconds in which requests count.", rich_help_panel=TIME_PANEL)
    ] = 60.0,
    drain: Annotated[
        float, typer.Option(min=0, help="Longest wait for these requests, in seconds.", rich_help_panel=TIME_PANEL)
    ] = 30.0,
    workload: Annotated[
        Path | None, typer.Option(help="TOML file of the workload.", rich_help_panel=REQUESTS_PANEL)
    ] = None,
    print_workload: Annotated[
        bool, typer.Option("--print-workload", help="Print the packaged one and exit.", rich_help_panel=REQUESTS_PANEL)
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the requests; overrides the workload's.", rich_help_panel=REQUESTS_PANEL),
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Take the requests from this JSON-lines file.", rich_help_panel=REQUESTS_PANEL)
    ] = None,
    write_requests: Annotated[
        Path | None, typer.Option(help="Write the sent requests to a JSON-lines file.", rich_help_panel=REQUESTS_PANEL)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Measure this server instead of a stack; the URL ends in /v1.", rich_help_panel=SERVER_PANEL),
    ] = None,
    pools: Annotated[
        bool,
        typer.Option(
            "--pools",
            help="With --url: name the drafter pool of its hardware in each request.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = False,
    admission: Annotated[
        bool, typer.Option("--admission", help="Let the suite's gateway refuse requests.", rich_help_panel=ARMS_PANEL)
    ] = False,
    target: TargetOption = None,
    target_profile: Annotated[
        str | None,
        typer.Option(
            help="Measure the twin of this target profile (a name, or a file of `wisp calibrate`).",
            rich_help_panel=TWIN_PANEL,
        ),
    ] = None,
    acceptance: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.99, help="Chance of the twin's draft tokens to be accepted.", rich_help_panel=TWIN_PANEL
        ),
    ] = 0.75,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Trace of the twin, instead of an acceptance (a name, or a file).", rich_help_panel=TWIN_PANEL
        ),
    ] = None,
    dtype: DtypeOption = AUTO,
    cache_tokens: Annotated[
        int, typer.Option(min=1024, help="KV budget of the target, in tokens.", rich_help_panel=TARGET_PANEL)
    ] = 32768,
    name: Annotated[
        str, typer.Option(help="Name of the result files in .wisp/results.", rich_help_panel=RESULTS_PANEL)
    ] = NAME,
    crossover: Annotated[
        bool,
        typer.Option(
            "--crossover",
            help="Measure the time per token by number of streams instead, with drafts allowed, none and forced.",
            rich_help_panel=CROSSOVER_PANEL,
        ),
    ] = False,
    tokens: Annotated[
        int, typer.Option(min=16, help="Tokens of each stream of --crossover.", rich_help_panel=CROSSOVER_PANEL)
    ] = 48,
    again: Annotated[
        bool,
        typer.Option(
            "--replot", help="Draw the picture of an earlier run again and exit.", rich_help_panel=RESULTS_PANEL
        ),
    ] = False,
) -> None:
    """Measure SLO attainment under load. Ctrl-C ends the run and keeps its results."""
    with errors_shown():
        if print_workload:
            print(default_text(), end="")
            return
        console = terminal()
        if again:
            replot(name, console)
            return
        _refuse_ignored(context)
        let_idle_threads_sleep()
        settings = partial(
            _settings, target, target_profile, acceptance, trace, dtype, cache_tokens, admission, console
        )
        if crossover:
            counts = whole_numbers("--sessions", sessions or CROSSOVER_SESSIONS, 1, MOST_SESSIONS - 1)
            bench = CrossoverBench(crossover_workload(tokens, seed), counts, settings(), ConsoleProgress(console))
            run(bench.run)
            bench.report(machine(), "crossover" if name == NAME else name, console)
            return
        spec = workload_of(_read(workload) if workload else "", seed)
        plan = LoadPlan(
            arms=[] if url else arms_of(arms),
            sessions=whole_numbers("--sessions", sessions or ("" if search else SESSIONS), 1, MOST_SESSIONS - 1),
            search=CapacitySearch(first, most, tolerance) if search else None,
            repeats=repeat,
            window=Window(warm_up_s=warm_up, measure_s=measured, drain_s=drain),
            workload=spec,
            requests=from_lines(_read(requests)) if requests else spec,
        )
        facts: dict[str, Any] = {"threads": THREADS, "cache_tokens": cache_tokens, "admission": admission}
        if target_profile:
            drafts = {"trace": trace} if trace else {"acceptance": acceptance}
            facts = {"target_profile": target_profile, **drafts, "admission": admission}
        _run(plan, url, pools, settings, machine() | facts, name, write_requests, console)


def _refuse_ignored(context: typer.Context) -> None:
    """Raise SettingsError for options that have no effect beside the others."""
    flags = {option.name or "": max(option.opts, key=len) for option in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in flags}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if "crossover" in given and (ignored := [flags[name] for name in IGNORED_BY_CROSSOVER if name in given]):
        raise SettingsError(f"--crossover measures its own load: leave {', '.join(ignored)} out")
    of_twin = [flags[name] for name in ("acceptance", "trace") if name in given]
    if of_twin and "target_profile" not in given:
        raise SettingsError(f"{' and '.join(of_twin)} of a twin: name its --target-profile")
    if len(of_twin) > 1:
        raise SettingsError("a trace gives the drafts of a twin: leave --acceptance or --trace out")


def _settings(
    target: str | None,
    target_profile: str | None,
    acceptance: float,
    trace: str | None,
    dtype: str,
    cache_tokens: int,
    admission: bool,
    console: Console,
) -> ArmSettings:
    progress = ConsoleProgress(console)
    if target_profile:
        folder = prepare_twin(target_profile, target or LocalSettings().target, progress, acceptance, trace)
    else:
        folder = target_folder(target, progress)
    return ArmSettings(folder, ModelFolder(folder).resolved(dtype), cache_tokens, admission)


def _run(
    plan: LoadPlan,
    url: str | None,
    pools: bool,
    settings: Callable[[], ArmSettings],
    facts: dict[str, Any],
    name: str,
    write_requests: Path | None,
    console: Console,
) -> None:
    """Measure a server or all arms; then report all measured points, even after an error or an interrupt."""
    campaign = Campaign(plan, ConsoleProgress(console))
    about = "about" if plan.search is None else "up to about"
    console.print(f"this takes {about} {plan.about_s / 60:.0f} minutes", highlight=False)

    async def work() -> None:
        try:
            if url:
                await campaign.run_server(url, pools=pools)
            else:
                of_arms = settings()
                facts["model"] = of_arms.target.name
                if not is_twin(of_arms.target):
                    facts["dtype"] = of_arms.dtype
                await campaign.run_arms(of_arms)
        finally:
            if campaign.results.points:
                conclude(campaign, facts, name, console)

    try:
        run(work)
    except KeyboardInterrupt:
        if not campaign.results.points:
            raise
        console.print("interrupted; the points measured until then are above")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if write_requests and campaign.asked:
            write_requests.write_text(to_lines(list(campaign.asked.values())))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    run_program(main, "wisp bench load")
