"""`wisp trace`: records a target's answers and its draft's tokens on held-out prompts, and fits traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.tools.cli.program import Program
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, require

app = Program(help="Record a target's answers and its draft's tokens, for twins.", no_args_is_help=True)
OutOption = Annotated[Path, typer.Option("--out", help="File to write (.npz).")]
SourceArgument = Annotated[str, typer.Argument(help="A trace: a shipped name, or a file.")]


@app.command("record")
def record(
    out: OutOption = Path("trace.npz"),
    target: TargetOption = None,
    draft: Annotated[Path | None, typer.Option(help="Folder of a draft. \\[default: the target's shipped one]")] = None,
    prompts: Annotated[
        int, typer.Option(min=11, help="Held-out prompts, of all kinds; each is answered at three temperatures.")
    ] = 132,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    run: Annotated[
        Path | None, typer.Option(help="Folder for the texts and parts. \\[default: .wisp/traces/TARGET-PROMPTS]")
    ] = None,
) -> None:
    """Record answers and drafts. The same command continues a stopped recording."""
    with errors_shown():
        require("model", "training")
        from services.tools.bench.support.options import let_idle_threads_sleep, target_folder
        from services.tools.bench.support.report import table, terminal, written
        from services.tools.local.progress import ConsoleProgress

        let_idle_threads_sleep()
        from services.tools.twin.traces import recorded, summary
        from shared.twin.trace import save_trace

        console = terminal()
        progress = ConsoleProgress(console)
        trace, weights = recorded(target_folder(target, progress), draft, prompts, threads, run, progress)
        save_trace(trace, out)
        console.print(table(f"trace of {trace.texts} texts", *summary(trace, weights)))
        written(console, out)


@app.command("fit")
def fit(
    source: SourceArgument,
    acceptance: Annotated[float, typer.Argument(help="First-token acceptance of the draft model, from 0.5 to 0.9.")],
    out: OutOption,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the changed tokens.")] = 0,
) -> None:
    """Change the acceptance of a trace, so that it represents another pair of models."""
    with errors_shown():
        require("model", "training")
        from services.tools.bench.support.report import table, terminal, written
        from services.tools.twin.fitting import fitted
        from services.tools.twin.traces import shipped_weights, summary
        from shared.twin.files import trace_path
        from shared.twin.trace import load_trace, save_trace

        console, weights = terminal(), shipped_weights()
        trace = load_trace(trace_path(source))
        made = fitted(trace, acceptance, seed)
        save_trace(made, out)
        for name, one in (("before", trace), ("after", made)):
            console.print(table(name, *summary(one, weights)))
        written(console, out)


@app.command("show")
def show(source: SourceArgument) -> None:
    """Print a summary of a trace."""
    with errors_shown():
        require("model", "training")
        from services.tools.bench.support.report import table, terminal
        from services.tools.cli.core.text_parts import printable
        from services.tools.twin.traces import shipped_weights, summary
        from shared.twin.files import trace_path
        from shared.twin.trace import load_trace

        console = terminal()
        trace = load_trace(trace_path(source))
        title = f"{trace.texts} texts, {len(trace.tokens)} positions"
        console.print(table(title, *summary(trace, shipped_weights())))
        facts = printable(", ".join(f"{key} {value}" for key, value in trace.facts.items()))
        console.print(facts, style="dim", highlight=False, markup=False)
