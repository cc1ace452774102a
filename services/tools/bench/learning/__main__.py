"""`wisp bench learning`: acceptance of a draft that learns from the requests of one domain, against the shipped one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from services.drafter.control import Controller
from services.drafter.core.observed import ObservedText
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine
from services.drafter.learning.learner import DraftLearner
from services.drafter.learning.reports import LearningOptions, LearningReport
from services.drafter.sources.hidden import WINDOW, HiddenDrafts
from services.tools.bench.support.drafts import (
    DraftFolderOption,
    RunFolderOption,
    measured_draft,
    trained_target,
    training_run,
)
from services.tools.bench.support.options import TargetFolderOption, run_program
from services.tools.bench.support.report import conclude, machine, table, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.training import shards
from services.tools.training.evaluate import Costs, Drafted, Summary, rounds
from services.tools.training.generate import sampling
from services.tools.training.shards import GeneratedText
from shared.models.folder import ModelFolder

DRAFT_LENGTH = 4
SOURCES = ("hidden",)
TOGETHER = 10
"""Number of requests drafted before the draft learns from them."""
ELSEWHERE = 60
"""Most texts of other kinds, on which forgetting is measured."""
NO_COSTS = Costs(1.0, 0.0, 0.0)

Row = dict[str, Any]


class LearningTrial:
    """A draft that learns from requests, and the shipped one, which does not change."""

    def __init__(self, folder: HiddenDraftFolder, target: ModelFolder, options: LearningOptions) -> None:
        self.learner = DraftLearner(folder, target, options)
        self.engine = DraftEngine(folder, target, threads=1, budget_tokens=1 << 14)
        self.fixed = HiddenDrafts(DraftEngine(folder, target, threads=1, budget_tokens=1 << 14))
        self.learning = HiddenDrafts(self.engine)
        self.reports: list[LearningReport] = []
        self.learning_s = 0.0

    def requests(self, texts: Sequence[GeneratedText]) -> tuple[list[Drafted], list[Drafted]]:
        """Draft some requests with both drafts, then learn from them; return the rounds of both."""
        drafted = rounds_of(self.fixed, texts), rounds_of(self.learning, texts)
        started = time.process_time()
        for text in texts:
            self.learner.add(observed(text))
        while self.learner.has_work:
            report = self.learner.work()
            if report is not None:
                self.reports.append(report)
                if report.weights is not None:
                    self.engine.replace(report.weights)
        self.learning_s += time.process_time() - started
        return drafted


def observed(text: GeneratedText) -> ObservedText:
    """Return the part of a text whose hidden states its drafter receives."""
    start = max(0, text.prompt_len - WINDOW - 1)
    return ObservedText(
        text.tokens[start:].int().numpy(),
        text.hidden[start:-1].to(torch.bfloat16).contiguous().view(torch.uint16).numpy(),
        text.prompt_len - start,
        start,
        sampling(text.origin, text.temperature),
    )


def rounds_of(source: HiddenDrafts, texts: Sequence[GeneratedText]) -> list[Drafted]:
    """Draft texts in rounds of a fixed length."""
    return list(rounds(source, SOURCES, Controller("fixed", DRAFT_LENGTH), texts))


def main(
    target: TargetFolderOption = None,
    draft: DraftFolderOption = None,
    run: RunFolderOption = None,
    domain: Annotated[str, typer.Option(help="Kind of text of the requests, as in the training's templates.")] = "code",
    requests: Annotated[int, typer.Option(min=20, help="Number of requests.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature of the requests.")] = 0.7,
    windows: Annotated[int, typer.Option(min=2, help="Rows of the table, each with as many requests.")] = 4,
) -> None:
    """Measure what a draft learns from its requests, and what it forgets elsewhere."""
    with errors_shown():
        console = terminal()
        model = trained_target(target)
        folder = measured_draft(draft, model)
        texts = training_run(run, model)
        console.print("generating the texts, unless an earlier run did (minutes)", style="dim")
        answered = texts.generate_domain(domain, requests, temperature, lambda _: None)
        texts.generate_held_out(texts.held_out, texts.config.seed, lambda _: None)
        others = [text for text in shards.load_all(texts.held_out) if text.kind != domain]
        torch.set_num_threads(1)
        trial = LearningTrial(folder, model, LearningOptions())
        record = _measure(trial, answered, others[:: max(1, len(others) // ELSEWHERE)], windows, console)
        facts = {**machine(), "model": model.name, "domain": domain, "temperature": temperature}
        conclude(console, "learning", {"facts": facts, "draft": str(folder.path), **record})


def _measure(
    trial: LearningTrial,
    answered: Sequence[GeneratedText],
    others: Sequence[GeneratedText],
    windows: int,
    console: Console,
) -> dict[str, Any]:
    size = -(-len(answered) // windows)
    over_time: list[Row] = []
    for first in range(0, len(answered), size):
        window = answered[first : first + size]
        both = [trial.requests(window[i : i + TOGETHER]) for i in range(0, len(window), TOGETHER)]
        over_time.append({"requests": f"{first + 1} to {first + len(window)}", **_compared(both)})
    _print(console, "Requests of the domain, in their order", over_time)
    fixed, learned = rounds_of(trial.fixed, others), rounds_of(trial.learning, others)
    elsewhere: list[Row] = []
    for kind in [*sorted({one.kind for one in fixed}), "all"]:
        chosen = [[one for one in some if kind in (one.kind, "all")] for some in (fixed, learned)]
        elsewhere.append({"text": kind, **_figures(*chosen)})
    _print(console, "Other kinds of text, afterwards", elsewhere)
    comparisons = [
        {
            "updates": report.updates,
            "outcome": report.outcome.value,
            "version": report.version,
            "shipped": report.shipped_acceptance,
            "in use": report.acceptance,
        }
        for report in trial.reports
    ]
    _print(console, "Comparisons on held-back texts", comparisons)
    console.print(f"CPU time of learning: {trial.learning_s:.0f} s", highlight=False)
    return {
        "over_time": over_time,
        "elsewhere": elsewhere,
        "comparisons": comparisons,
        "learning_cpu_s": trial.learning_s,
    }


def _compared(both: Sequence[tuple[list[Drafted], list[Drafted]]]) -> Row:
    return _figures([one for fixed, _ in both for one in fixed], [one for _, learned in both for one in learned])


def _figures(fixed: Sequence[Drafted], learned: Sequence[Drafted]) -> Row:
    before, after = Summary.of(fixed, NO_COSTS, 1), Summary.of(learned, NO_COSTS, 1)
    return {
        "shipped: 1st accepted": before.by_position[0],
        "learned: 1st accepted": after.by_position[0],
        "gain": after.by_position[0] - before.by_position[0],
        "shipped: tokens a round": before.tokens_per_round,
        "learned: tokens a round": after.tokens_per_round,
    }


def _print(console: Console, title: str, rows: Sequence[Row]) -> None:
    if rows:
        console.print(table(title, list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    run_program(main, "wisp bench learning")
