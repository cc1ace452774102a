"""How many sessions each way of serving can keep its promises to: `wisp bench load`.

Sessions ask over HTTP as any client does (`workload`, `drive`); each arm (`arms`) is asked the same requests at the
same numbers of sessions, on a stack of its own. All arms have one thread for the target, the same cache, and the same
devices; admission control is off unless asked for, so that a policy shows by itself what it does under load.

The suite's arms emulate devices that draft. Without drafters a device only asks: its request takes its uplink's time
once (`client`). Of the way back to it neither kind of arm has the last part: text counts when it leaves the gateway.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from services.tools.bench.load.arms import NAMES, arms_of
from services.tools.bench.load.campaign import ArmSettings, Campaign, CapacitySearch, LoadPlan
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.requests import MOST_SESSIONS, RequestSource, from_lines, to_lines
from services.tools.bench.load.report import conclude, replot
from services.tools.bench.load.workload import default_text, workload_of
from services.tools.bench.support.report import machine, terminal
from services.tools.cli.terminal import INTERRUPTED, errors_shown, run
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from shared.errors import SettingsError

ARMS = "centralized,colocated,sled,fcfs,edf,wisp,wisp+"
SESSIONS = "2,4,8,16"


def main(
    arms: Annotated[
        str, typer.Option(help=f"some of {', '.join(NAMES)}; wisp+/trimming,price goes without these")
    ] = ARMS,
    sessions: Annotated[
        str | None, typer.Option(help=f"numbers of sessions to measure [default: {SESSIONS}; with --search none]")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="search for the most sessions that hold")] = False,
    first: Annotated[int, typer.Option(min=1, help="sessions that a search begins with")] = 4,
    most: Annotated[int, typer.Option(min=1, max=MOST_SESSIONS - 1, help="sessions that a search ends with")] = 64,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="share of the capacity that a search leaves open")
    ] = 0.1,
    repeat: Annotated[int, typer.Option(min=1, help="times that each number of sessions is measured")] = 1,
    warm_up: Annotated[float, typer.Option(min=0, help="seconds of load before those that count")] = 10.0,
    measured: Annotated[float, typer.Option("--measure", min=1, help="seconds in which requests count")] = 60.0,
    drain: Annotated[float, typer.Option(min=0, help="seconds that they may need after that")] = 30.0,
    workload: Annotated[Path | None, typer.Option(help="TOML file of the workload")] = None,
    print_workload: Annotated[bool, typer.Option("--print-workload", help="show the packaged one and end")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="of everything; before the workload's own")] = None,
    requests: Annotated[Path | None, typer.Option(help="take requests from this JSON-lines file")] = None,
    write_requests: Annotated[Path | None, typer.Option(help="write what was asked to a JSON-lines file")] = None,
    url: Annotated[
        str | None, typer.Option(help="measure this server, whose URL ends in /v1; no stack is started")
    ] = None,
    pools: Annotated[bool, typer.Option("--pools", help="with --url: name each device's pool in its requests")] = False,
    admission: Annotated[bool, typer.Option("--admission", help="let the suite's gateway refuse requests")] = False,
    target: Annotated[str | None, typer.Option(help="packaged model or a Hugging Face folder")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    cache_tokens: Annotated[int, typer.Option(min=1024, help="K/V budget of the target, in tokens")] = 32768,
    name: Annotated[str, typer.Option(help="of the files in .wisp/results")] = "load",
    again: Annotated[bool, typer.Option("--replot", help="draw the picture of an earlier run again and end")] = False,
) -> None:
    """Measure promises kept under load; Ctrl-C ends it and keeps what was measured."""
    with errors_shown():
        if print_workload:
            print(default_text(), end="")
            return
        console = terminal()
        if again:
            replot(name, console)
            return
        # Before any service starts: waiting threads must not spin while others work.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        spec = workload_of(_read(workload) if workload else "", seed)
        source: RequestSource = from_lines(_read(requests)) if requests else spec
        plan = LoadPlan(
            arms=[] if url else arms_of(arms),
            sessions=_sessions(sessions or ("" if search else SESSIONS)),
            search=CapacitySearch(first, most, tolerance) if search else None,
            repeats=repeat,
            window=Window(warm_up_s=warm_up, measure_s=measured, drain_s=drain),
            workload=spec,
            requests=source,
        )
        campaign = Campaign(plan, ConsoleProgress(console))
        about = "about" if plan.search is None else "up to about"
        console.print(f"this takes {about} {plan.about_s / 60:.0f} minutes", highlight=False)
        facts: dict[str, Any] = machine() | {"dtype": dtype, "cache_tokens": cache_tokens, "admission": admission}

        async def work() -> None:
            try:
                if url:
                    await campaign.run_server(url, pools=pools)
                else:
                    folder = prepare_target(target or LocalSettings().target, ConsoleProgress(console))
                    facts["model"] = folder.name
                    await campaign.run_arms(ArmSettings(folder, dtype, cache_tokens, admission))
            finally:
                if campaign.results.points:
                    conclude(campaign, facts, name, console)
                if write_requests and campaign.asked:
                    write_requests.write_text(to_lines(list(campaign.asked.values())))

        try:
            run(work)
        except KeyboardInterrupt:
            if not campaign.results.points:
                raise
            console.print("interrupted; what was measured until then is above")
            raise typer.Exit(INTERRUPTED) from None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


def _sessions(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and 0 < int(word) < MOST_SESSIONS for word in words):
        raise SettingsError(f"--sessions takes numbers from 1 to {MOST_SESSIONS - 1}, as {SESSIONS} (given: {text!r})")
    return list(dict.fromkeys(int(word) for word in words))


if __name__ == "__main__":
    typer.run(main)
