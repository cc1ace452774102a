"""`wisp bench engine`: time of the engine's passes against transformers and llama.cpp.

Every arm (a program with one format of weights) has a process of its own and the same cases: decoding a token,
verifying 5 and 9 tokens with logits of all, prefilling a prompt, and decoding and verifying for several sessions at
once. Arms take turns, so that a drift of the machine affects all of them; figures are medians of the repetitions. A
time is that of one pass from the tokens to the logits; rolling the cache back is not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from services.tools.bench.engine import llama_package
from services.tools.bench.engine.arms import ArmSizes, EngineArm
from services.tools.bench.engine.core.cases import cases
from services.tools.bench.engine.core.results import EngineTimes, findings, speed_up_table, threads_of, times_table
from services.tools.bench.engine.measure import measure, started
from services.tools.bench.support.options import ModelOption, run_program, some_of, target_folder, whole_numbers
from services.tools.bench.support.report import conclude, cpu_kind, machine, records, table, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import DEFAULT_TARGET
from shared.errors import SettingsError
from shared.models.folder import ModelFolder

TRANSFORMERS_DTYPES = ("bfloat16", "float32")
MOST_SESSIONS = 255
"""llama.cpp takes 256 sequences; one of them is the prompt's."""


def main(
    model: ModelOption = DEFAULT_TARGET,
    arms: Annotated[
        str, typer.Option(help='Arms to measure, such as "wisp bfloat16,llama.cpp Q4_1"; all by default.')
    ] = "",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of CPU threads. \\[default: 1,2; on one core: 1]", show_default=False)
    ] = None,
    cached: Annotated[str, typer.Option(help="Numbers of cached tokens of each session.")] = "256",
    sessions: Annotated[str, typer.Option(help="Numbers of sessions that are decoded for at once.")] = "8,32",
    repetitions: Annotated[int, typer.Option(min=1, help="Visits to each arm with each case.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One thread and one visit, in some minutes.")] = False,
    install_llama: Annotated[
        bool, typer.Option("--install-llama", help="Compile llama-cpp-python into .wisp/llama first.")
    ] = False,
) -> None:
    """Time the engine's passes against transformers and llama.cpp."""
    with errors_shown():
        console = terminal()
        progress = ConsoleProgress(console)
        facts = machine()  # the load average is from before the run
        if install_llama and not llama_package.installed():
            llama_package.install(progress)
        counts = whole_numbers("--sessions", sessions, 1, MOST_SESSIONS)
        all_sizes = [
            ArmSizes(number, length, max([1, *counts]))
            for number in whole_numbers("--threads", threads or _default_threads(quick), 1)
            for length in whole_numbers("--cached", cached, 1)
        ]
        notes: list[str] = []
        known = {arm.name: arm for arm in all_arms(model, target_folder(model, progress), notes)}
        chosen = [known[name] for name in (some_of("--arms", arms, known) if arms else known)]
        visits = 1 if quick else repetitions
        facts |= {"model": Path(model).name, "repetitions": visits}
        measured = []
        for sizes in all_sizes:
            with started(chosen, sizes, progress, notes) as processes:
                if not processes:
                    raise SettingsError("no arm can be measured: " + "; ".join(notes))
                for process in processes:
                    facts |= {key: value for key, value in process.facts.items() if isinstance(value, str)}
                times = measure(processes, sizes, cases(counts, sizes.cached), visits, progress)
            _show(console, times, Path(model).name)
            measured.append(times)
        conclude(console, "engine", _record(facts, measured, notes))


def all_arms(model: str, folder: Path, notes: list[str]) -> list[EngineArm]:
    """Return all arms that this model and machine have. `notes` gets the reason why llama.cpp is missing."""
    arms = [EngineArm("wisp", dtype, folder) for dtype in ModelFolder(folder).dtypes]
    arms += [EngineArm("transformers", dtype, folder) for dtype in TRANSFORMERS_DTYPES]
    return arms + llama_package.arms(model, notes)


def _default_threads(quick: bool) -> str:
    return "1" if quick or (psutil.cpu_count() or 1) == 1 else "1,2"


def _show(console: Console, times: EngineTimes, model: str) -> None:
    about = f"{model}, {threads_of(times.threads)}, {times.cached} cached tokens, {cpu_kind()}"
    console.print(table(f"Engine: {about}", *times_table(times)))
    columns, rows = speed_up_table(times)
    if rows:
        console.print(table(f"Speed against other programs: {about}", columns, rows))


def _record(facts: dict[str, Any], measured: Sequence[EngineTimes], notes: list[str]) -> dict[str, Any]:
    return {
        "title": "Engine, transformers and llama.cpp",
        "facts": facts,
        "tables": [
            {
                "threads": times.threads,
                "cached": times.cached,
                "medians": records(*times_table(times)),
                "speed_ups": records(*speed_up_table(times)),
            }
            for times in measured
        ],
        "visits": [record for times in measured for record in times.records()],
        "notes": [*dict.fromkeys(notes), *(note for times in measured for note in findings(times))],
    }


if __name__ == "__main__":
    run_program(main, "wisp bench engine")
