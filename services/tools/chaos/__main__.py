"""`wisp chaos`: inject faults under load, and check that nothing is lost and no token is wrong.

The suite has two processes of each service and private brokers. A seed determines the faults and the requests, some of
which are cancelled or read slowly. Every answer is compared token for token with that of the bare engine. At the end
the suite must be idle and hold no sessions, messages or KV.
"""

from __future__ import annotations

import logging
import secrets
import shlex
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from services.tools.bench.support.options import NameOption, let_idle_threads_sleep, run_program, target_folder, words
from services.tools.bench.support.report import report, terminal
from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos.core.faults import FaultKind, schedule
from services.tools.chaos.core.report import COLUMNS, notes, rows
from services.tools.chaos.core.requests import load
from services.tools.chaos.core.verdicts import ChaosResult
from services.tools.chaos.reference import References
from services.tools.chaos.run import ChaosPlan, run
from services.tools.chaos.site import clocks_differ
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown
from services.tools.cli.terminal import run as run_to_end
from services.tools.local.progress import ConsoleProgress
from shared.errors import SettingsError


def main(
    faults: Annotated[int, typer.Option(min=0, help="Number of faults.")] = 200,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of faults and requests. \\[default: random, and printed]")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 12,
    lanes: Annotated[int, typer.Option(min=1, help="Most faults at a time.")] = 2,
    only: Annotated[str, typer.Option(help="Kinds of faults, separated by commas. \\[default: all]")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    questions: Annotated[int, typer.Option(min=1, help="Number of different questions.")] = 24,
    tiny: Annotated[bool, typer.Option("--tiny", help="Use a tiny random model, for many more requests.")] = False,
    target: TargetOption = None,
    handoff: Annotated[str, typer.Option(help="KV handoff between verifiers: off, drain or write-through.")] = "drain",
    name: NameOption = "chaos",
) -> None:
    """Run a schedule of faults. Exit status 1 if anything is lost or wrong."""
    with errors_shown(), ExitStack() as resources:
        let_idle_threads_sleep()
        for library in ("aio_pika", "aiormq"):  # they log every broken connection, and all connections break here
            logging.getLogger(library).setLevel(logging.CRITICAL)
        seed = secrets.randbelow(10**6) if seed is None else seed
        console = terminal()
        console.print(f"seed {seed}", highlight=False)
        progress = ConsoleProgress(console)
        if tiny:
            folder = tiny_model(Path(resources.enter_context(TemporaryDirectory(prefix="wisp-tiny-"))) / "tiny")
        else:
            folder = target_folder(target, progress)
        requests = load(seed, questions, tokens)
        with progress.step("computing the reference answers"):
            references = References(folder, requests.questions, tokens)
        plan = ChaosPlan(
            target=folder,
            faults=schedule(seed, faults, _kinds(only)),
            load=requests,
            clients=clients,
            lanes=lanes,
            env={"WISP_KV_HANDOFF": handoff},
            env_of={"verifier": {"WISP_PROFILE": "false"}} if tiny else {},
        )
        result = run_to_end(lambda: run(plan, references, progress, lambda text: console.print(text, markup=False)))
        _report(name, plan, handoff, result)
        if result.problems:
            command = f"--seed {seed} --faults {faults} --clients {clients} --lanes {lanes} --tokens {tokens}"
            command += f" --questions {questions} --handoff {handoff}" + (" --tiny" if tiny else "")
            command += f" --only {shlex.quote(only)}" if only else ""
            _print_problems(console, result, command)
            raise typer.Exit(1)


def _report(name: str, plan: ChaosPlan, handoff: str, result: ChaosResult) -> None:
    facts = {
        "seed": plan.load.seed,
        "model": plan.target.name,
        "clients": plan.clients,
        "faults at once": plan.lanes,
        "KV handed over": handoff,
        "clocks differ": run_to_end(clocks_differ),
    }
    report(name, "Faults, and the requests during them", COLUMNS, rows(result), facts=facts, notes=notes(result))


def _print_problems(console: Console, result: ChaosResult, command: str) -> None:
    for problem in result.problems:
        console.print(problem, markup=False, highlight=False, style="red")
    console.print(f"logs of the services: {result.logs}", highlight=False, soft_wrap=True)
    console.print(f"repeat these faults and requests: wisp chaos {command}", highlight=False, soft_wrap=True)


def _kinds(only: str) -> tuple[FaultKind, ...]:
    chosen = words(only)
    if unknown := [word for word in chosen if word not in list(FaultKind)]:
        raise SettingsError(f"--only {unknown[0]!r} is no kind of fault; there are: {', '.join(FaultKind)}")
    return tuple(FaultKind(word) for word in chosen) or tuple(FaultKind)


if __name__ == "__main__":
    run_program(main, "wisp chaos")
