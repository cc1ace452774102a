"""Stages of `wisp draft train` and `wisp draft evaluate`, with progress and results on the terminal."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from services.drafter.control import Controller, ControlWeights
from services.drafter.control_files import load_weights, write_record
from services.drafter.hidden.card import CONTROLLER, HiddenDraftFolder, shipped_for
from services.drafter.hidden.engine import DraftEngine
from services.drafter.sources.hidden import HiddenDrafts
from services.tools.cli.terminal import out
from services.tools.local.progress import ConsoleProgress, ProgressStep
from services.tools.training import controller, shards
from services.tools.training.carried import CarriedRun
from services.tools.training.evaluate import Costs, Drafted, Summary, entropies, rounds
from services.tools.training.run import TrainingRun, created
from services.tools.training.train import TrainingProgress
from shared.errors import ModelError

T = TypeVar("T")
RECORDED_LENGTH = 6
EVALUATED_LENGTH = 4
COSTS = Costs(round_ms=36.0, token_ms=0.9, step_ms=3.4)
"""Measured with SmolLM2-135M on one core. No printed figure depends on them; `wisp bench draft` measures its own."""


def train_draft(run: TrainingRun, to: Path, carry: Path | None = None) -> None:
    """Run all stages that are not done yet; write the draft with its controller to `to`.

    carry: folder of pieces with which another machine goes on (`CarriedRun`). If the run's time is up before the end,
    nothing is written to `to`.
    """
    # An unusable target or folder stops the run before hours are spent.
    run.config_of_model()
    created(to)
    carried = None if carry is None else CarriedRun(carry, run)
    try:
        finished = _train(run, to, carried)
    finally:
        if carried is not None:
            carried.keep()
    if finished:
        evaluate_draft(run, to)
        out.print(f"The draft is in {to}. Use it with: wisp up --hidden-draft {to}", soft_wrap=True)
    else:
        out.print("The time is up. The same command goes on where this one has stopped.", soft_wrap=True)


def _train(run: TrainingRun, to: Path, carried: CarriedRun | None) -> bool:
    """Run the stages up to the controller; return whether all are done."""
    progress = ConsoleProgress(out)

    def watching(report: Callable[[T], None]) -> Callable[[T], None]:
        return report if carried is None else carried.watching(report)

    if carried is not None and carried.found:
        with progress.step("computing the states of texts that were carried here") as step:
            step.done(f"{carried.restore():,} texts were carried here")
        if run.time_is_up:
            return False
    with progress.step("drawing prompts") as step:
        count = run.write_prompts()
        step.done(f"{count:,} prompts")
    with progress.step("generating the target's answers") as step:
        run.generate_all(watching(_counted(step, "completions", count - len(shards.origins(run.texts)))))
        step.done("training completions are complete" if not run.time_is_up else "the time is up")
    for folder, seed in ((run.held_out, run.config.seed), (run.controller_texts, run.config.seed + 1)):
        if run.time_is_up:
            return False
        with progress.step("generating held-out completions") as step:
            run.generate_held_out(folder, seed, _counted(step, "completions", 3 * run.config.prompts.held_out))
            step.done(f"held-out completions are complete ({folder.name})")
    if run.time_is_up:
        return False
    with progress.step("training") as step:
        model = run.train(watching(lambda progress: step.detail(_progress_line(progress))))
        step.done(f"trained in {step.elapsed_s / 60:.0f} minutes")
    if run.time_is_up:
        return False
    run.save(model, to)
    with progress.step("training the controller") as step:
        rounds_file = run.folder / "rounds.jsonl"
        _record(run, HiddenDraftFolder.open(to), rounds_file)
        controller.train([rounds_file], to / CONTROLLER, run.config.seed)
        step.done("controller trained")
    return True


def evaluate_draft(run: TrainingRun, path: Path | None, *, final: bool = False) -> None:
    """Print acceptance by position and tokens per round, by kind of text and temperature, with and without lookup.

    final: draft for the final prompts instead of those for evaluation.
    """
    folder = _folder(run, path)
    with ConsoleProgress(out).step("generating held-out completions") as step:
        chosen = run.evaluation_texts(_counted(step, "completions", 3 * run.config.prompts.held_out), final=final)
        step.done(f"held-out completions are complete ({chosen.name})")
    texts = list(shards.load_all(chosen))
    source = _source(run, folder)
    for names in (("hidden",), ("hidden", "lookup")):
        with ConsoleProgress(out).step(f"drafting by {' and '.join(names)}") as step:
            done = list(rounds(source, names, Controller("fixed", EVALUATED_LENGTH, _weights(folder)), texts))
            step.done(f"{len(done):,} rounds by {' and '.join(names)}, always {EVALUATED_LENGTH} tokens")
        out.print(_table(done))


def record_rounds(run: TrainingRun, path: Path | None, to: Path) -> None:
    """Write rounds for the controller's training to `to`."""
    folder = _folder(run, path)
    with ConsoleProgress(out).step("generating held-out completions") as step:
        run.generate_held_out(
            run.controller_texts, run.config.seed + 1, _counted(step, "completions", 3 * run.config.prompts.held_out)
        )
        step.done("held-out completions are complete")
    with ConsoleProgress(out).step("recording rounds") as step:
        count = _record(run, folder, to)
        step.done(f"{count:,} rounds written to {to}")


def _record(run: TrainingRun, folder: HiddenDraftFolder, to: Path) -> int:
    texts = list(shards.load_all(run.controller_texts))
    source = _source(run, folder)
    # Live results carry entropies too; computing them needs the whole head.
    known = entropies(texts, run.parts(0))
    fixed = Controller("fixed", RECORDED_LENGTH)
    count = 0
    with to.open("w", encoding="utf-8") as file:
        for drafted in rounds(source, ("hidden", "lookup"), fixed, texts, known):
            write_record(file, drafted.record)
            count += 1
    return count


def _folder(run: TrainingRun, path: Path | None) -> HiddenDraftFolder:
    if path is not None:
        return HiddenDraftFolder.open(path)
    shipped = shipped_for(run.target)
    if shipped is None:
        raise ModelError(f"no draft is shipped for {run.target.path}; name one's folder with --draft")
    return shipped


def _source(run: TrainingRun, folder: HiddenDraftFolder) -> HiddenDrafts:
    settings = run.config.training
    return HiddenDrafts(
        DraftEngine(
            folder,
            run.target,
            dtype=run.config.target_dtype,
            torch_device=run.config.device,
            threads=settings.threads,
            budget_tokens=1 << 16,
        )
    )


def _weights(folder: HiddenDraftFolder) -> ControlWeights | None:
    return load_weights(folder.controller) if folder.controller else None


def _table(drafted: Sequence[Drafted]) -> Table:
    table = Table()
    for column in ("kind", "rounds", "1st", "2nd", "3rd", "4th", "tokens a round"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    groups: dict[str, list[Drafted]] = defaultdict(list)
    for one in drafted:
        groups[one.kind].append(one)
        groups[f"temperature {one.temperature:.1f}"].append(one)
    for name, group in [*sorted(groups.items()), ("all", list(drafted))]:
        summary = Summary.of(group, COSTS, EVALUATED_LENGTH)
        chain = [f"{share:.2f}" for share in summary.by_position] + [""] * EVALUATED_LENGTH
        table.add_row(name, f"{summary.rounds:,}", *chain[:EVALUATED_LENGTH], f"{summary.tokens_per_round:.2f}")
    return table


def _counted(step: ProgressStep, what: str, of: int) -> Callable[[int], None]:
    """Return a callback that counts completions and shows the remaining time."""
    started = time.monotonic()
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens > 0
        left_s = (time.monotonic() - started) / max(1, done) * (of - done)
        step.detail(f"{done:,} of {of:,} {what}, about {left_s / 60:.0f} minutes left")

    return count


def _progress_line(progress: TrainingProgress) -> str:
    left_min = (progress.of - progress.tokens) / max(progress.rate, 1) / 60
    agreement = ", ".join(f"{share:.2f}" for share in progress.agreement)
    return (
        f"stage {progress.stage + 1}: {progress.tokens / 1e6:.1f} of {progress.of / 1e6:.1f} million tokens, "
        f"agreement {agreement}, about {left_min:.0f} minutes left in this stage"
    )
