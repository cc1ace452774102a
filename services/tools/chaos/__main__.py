"""Lets everything fail under load, and checks that nothing is lost and nothing is wrong: `wisp chaos`.

Two of each service on private brokers, and clients whose requests, cancels and slow reading are drawn from a seed, as
are the faults. Every answer is compared with what the bare engine says, token for token; at the end nothing may be
left behind.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from services.tools.bench.support.report import report as tell
from services.tools.bench.support.report import terminal
from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos import report
from services.tools.chaos.core.faults import Kind, schedule
from services.tools.chaos.core.requests import load
from services.tools.chaos.reference import References
from services.tools.chaos.run import Plan, run
from services.tools.chaos.site import clocks_differ
from services.tools.cli.terminal import errors_shown
from services.tools.cli.terminal import run as run_to_end
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from shared.errors import SettingsError


def main(
    faults: Annotated[int, typer.Option(min=0, help="How many.")] = 200,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of faults and requests \\[default: drawn, and told].")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 12,
    lanes: Annotated[int, typer.Option(min=1, help="Faults at once at most.")] = 2,
    only: Annotated[str, typer.Option(help="Kinds of faults, separated by commas; all if none is named.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 48,
    questions: Annotated[int, typer.Option(min=1, help="Different questions.")] = 24,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny random model: many more requests, no language.")] = False,
    target: Annotated[str | None, typer.Option(help="Packaged model's name, or a model's folder.")] = None,
    handoff: Annotated[str, typer.Option(help="K/V handed over: off, drain or write-through.")] = "drain",
    name: Annotated[str, typer.Option(help="Of the file in .wisp/results.")] = "chaos",
) -> None:
    """Run a schedule of faults; exit status 1 if anything was lost or wrong."""
    with errors_shown(), ExitStack() as resources:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        for library in ("aio_pika", "aiormq"):  # they tell of every connection that breaks here, as all of them do
            logging.getLogger(library).setLevel(logging.CRITICAL)
        seed = secrets.randbelow(10**6) if seed is None else seed
        console = terminal()
        console.print(f"seed {seed}", highlight=False)
        progress = ConsoleProgress(console)
        if tiny:
            folder = tiny_model(Path(resources.enter_context(TemporaryDirectory(prefix="wisp-tiny-"))) / "tiny")
        else:
            folder = prepare_target(target or LocalSettings().target, progress)
        asked = load(seed, questions, tokens)
        with progress.step("computing what the answers have to be"):
            references = References(folder, asked.questions, tokens)
        plan = Plan(
            target=folder,
            faults=schedule(seed, faults, _kinds(only)),
            load=asked,
            clients=clients,
            lanes=lanes,
            env={"WISP_KV_HANDOFF": handoff},
            env_of={"verifier": {"WISP_PROFILE": "false"}} if tiny else {},
        )
        verdicts = run_to_end(lambda: run(plan, references, progress, lambda text: console.print(text, markup=False)))
        tell(
            name,
            "What failed, and what became of the requests",
            report.COLUMNS,
            report.rows(verdicts),
            facts={
                "seed": seed,
                "model": folder.name,
                "clients": clients,
                "faults at once": lanes,
                "K/V handed over": handoff,
                "clocks differ": run_to_end(clocks_differ),
            },
            notes=report.notes(verdicts),
        )
        if verdicts.problems:
            for problem in verdicts.problems:
                console.print(problem, markup=False, highlight=False, style="red")
            again = f"--seed {seed} --faults {faults} --clients {clients} --lanes {lanes} --tokens {tokens}"
            again += f" --questions {questions} --handoff {handoff}" + (" --tiny" if tiny else "")
            again += f" --only {shlex.quote(only)}" if only else ""
            console.print(f"the services' logs: {verdicts.logs}", highlight=False, soft_wrap=True)
            console.print(f"the same faults and requests again: wisp chaos {again}", highlight=False, soft_wrap=True)
            raise typer.Exit(1)


def _kinds(only: str) -> tuple[Kind, ...]:
    words = [word.strip() for word in only.split(",") if word.strip()]
    if unknown := [word for word in words if word not in list(Kind)]:
        raise SettingsError(f"--only {unknown[0]!r} is no kind of fault; there are: {', '.join(Kind)}")
    return tuple(Kind(word) for word in words) or tuple(Kind)


if __name__ == "__main__":
    typer.run(main)
