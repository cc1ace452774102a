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
from typing import Any

import typer
from rich.console import Console

from services.tools.bench.load.arms import arms_of
from services.tools.bench.load.campaign import THREADS, ArmSettings, Campaign, CapacitySearch, LoadPlan
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.requests import from_lines, to_lines
from services.tools.bench.load.crossover import SESSIONS as CROSSOVER_SESSIONS
from services.tools.bench.load.crossover import CrossoverBench
from services.tools.bench.load.crossover import workload as crossover_workload
from services.tools.bench.load.options import (
    SESSIONS,
    AcceptanceOption,
    AdmissionOption,
    AgainOption,
    CacheTokensOption,
    CrossoverOption,
    PoolsOption,
    PrintWorkloadOption,
    RequestsOption,
    SeedOption,
    SessionsOption,
    TargetProfileOption,
    TokensOption,
    TraceOption,
    UrlOption,
    WorkloadOption,
    WriteRequestsOption,
)
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
from services.tools.bench.load.report import conclude, replot
from services.tools.bench.load.workload import default_text, workload_of
from services.tools.bench.support.options import (
    DtypeOption,
    NameOption,
    let_idle_threads_sleep,
    run_program,
    target_folder,
    whole_numbers,
)
from services.tools.bench.support.report import machine, terminal
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import INTERRUPTED, errors_shown, run
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_twin
from shared.errors import SettingsError
from shared.models.folder import AUTO, ModelFolder
from shared.twin.layout import is_twin

NAME = "load"

IGNORED_BY_CROSSOVER = (
    "arms", "first", "most", "tolerance", "search", "warm_up", "measured", "drain", "workload", "requests",
    "write_requests", "url", "pools", "target_profile", "acceptance", "trace",
)  # fmt: skip


def main(
    context: typer.Context,
    arms: ArmsOption = ALL_ARMS,
    sessions: SessionsOption = None,
    search: SearchOption = False,
    first: FirstOption = 4,
    most: MostOption = 64,
    tolerance: ToleranceOption = 0.1,
    repeat: RepeatOption = 1,
    warm_up: WarmUpOption = 10.0,
    measured: MeasuredOption = 60.0,
    drain: DrainOption = 30.0,
    workload: WorkloadOption = None,
    print_workload: PrintWorkloadOption = False,
    seed: SeedOption = None,
    requests: RequestsOption = None,
    write_requests: WriteRequestsOption = None,
    url: UrlOption = None,
    pools: PoolsOption = False,
    admission: AdmissionOption = False,
    target: TargetOption = None,
    target_profile: TargetProfileOption = None,
    acceptance: AcceptanceOption = 0.75,
    trace: TraceOption = None,
    dtype: DtypeOption = AUTO,
    cache_tokens: CacheTokensOption = 32768,
    name: NameOption = NAME,
    crossover: CrossoverOption = False,
    tokens: TokensOption = 48,
    again: AgainOption = False,
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
            _measure_crossover(sessions, tokens, seed, repeat, settings(), name, console)
            return
        spec = workload_of(_read(workload) if workload else "", seed)
        plan = LoadPlan(
            arms=[] if url else arms_of(arms),
            sessions=whole_numbers("--sessions", sessions or ("" if search else SESSIONS), 1, LARGEST_POINT),
            search=CapacitySearch(first, most, tolerance) if search else None,
            repeats=repeat,
            window=Window(warm_up_s=warm_up, measure_s=measured, drain_s=drain),
            workload=spec,
            requests=from_lines(_read(requests)) if requests else spec,
        )
        facts = machine() | _facts(target_profile, acceptance, trace, cache_tokens, admission)
        _run(plan, url, pools, settings, facts, name, write_requests, console)


def _measure_crossover(
    sessions: str | None,
    tokens: int,
    seed: int | None,
    repeat: int,
    settings: ArmSettings,
    name: str,
    console: Console,
) -> None:
    counts = whole_numbers("--sessions", sessions or CROSSOVER_SESSIONS, 1, LARGEST_POINT)
    bench = CrossoverBench(crossover_workload(tokens, seed), counts, repeat, settings, ConsoleProgress(console))
    run(bench.run)
    bench.report(machine(), "crossover" if name == NAME else name, console)


def _facts(
    target_profile: str | None, acceptance: float, trace: str | None, cache_tokens: int, admission: bool
) -> dict[str, Any]:
    """Return what the results name of the arms' settings, beside the machine."""
    if not target_profile:
        return {"threads": THREADS, "cache_tokens": cache_tokens, "admission": admission}
    drafts = {"trace": trace} if trace else {"acceptance": acceptance}
    return {"target_profile": target_profile, **drafts, "admission": admission}


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
