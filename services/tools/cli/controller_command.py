"""`wisp controller`: trains the weights of the speculation controller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.tools.cli.program import Program
from services.tools.cli.terminal import errors_shown, out, require

if TYPE_CHECKING:
    from services.tools.training.controller import PredictorReport, SourceReport

app = Program(help="Train the controller that decides the length of drafts.", no_args_is_help=True)


@app.callback()
def controller() -> None:
    """Train the controller that decides the length of drafts."""


@app.command("train")
def train_controller(
    rounds: Annotated[list[Path], typer.Argument(help="Files of recorded rounds (JSON lines).")],
    to: Annotated[Path, typer.Option("--out", help="Weights file to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the split of sessions and of the initial weights.")] = 0,
    draft_cost: Annotated[
        float | None, typer.Option(min=0, help="Measured time of a draft step, relative to a round without drafts.")
    ] = None,
    token_cost: Annotated[
        float | None, typer.Option(min=0, help="Measured time of verifying one more token, relative to the same.")
    ] = None,
) -> None:
    """Fit the acceptance estimates and the predictor to recorded rounds, and print the value of each feature."""
    with errors_shown():
        require("training")
        from services.tools.training.controller import train

        costs = {"draft_cost": draft_cost, "token_cost": token_cost}
        report = train(rounds, to, seed, **{name: cost for name, cost in costs.items() if cost is not None})
        out.print(f"{report.rounds:,} rounds of {report.sessions:,} sessions")
        for source in report.sources:
            _show_source(source)
        if report.predictor is not None:
            _show_predictor(report.predictor)
        out.print(f"written to {to}", soft_wrap=True)


def _show_source(report: SourceReport) -> None:
    out.print()
    out.print(
        f"{report.source}: {report.tokens:,} tokens after accepted ones, {report.acceptance:.3f} of them accepted"
    )
    table = Table()
    table.add_column("features")
    for column in ("AUC", "loss (nats)"):
        table.add_column(column, justify="right")
    table.add_column("kept")
    words = {True: "yes", False: "no", None: ""}
    for trial in report.trials:
        table.add_row(trial.name, f"{trial.auc:.3f}", f"{trial.log_loss:.4f}", words[trial.kept])
    out.print(table)
    out.print(f"expected calibration error {report.error_after:.3f}, before {report.error_before:.3f}")
    table = Table()
    for column in ("predicted", "accepted", "tokens"):
        table.add_column(column, justify="right")
    for row in report.reliability:
        table.add_row(f"{row.predicted:.3f}", f"{row.accepted:.3f}", f"{row.tokens:,}")
    out.print(table)


def _show_predictor(report: PredictorReport) -> None:
    out.print()
    out.print(
        f"predictor: AUC {report.auc:.3f}; stops where rejection is over {report.threshold:.2f}: {report.gain:.3f} "
        f"tokens per target step, {report.gain_without:.3f} without it"
    )
