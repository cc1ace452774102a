"""`wisp bench draft`: acceptance, cost and gain of drafts on held-out prompts, by draft source and stop rule."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.drafter.control import Controller, ControlWeights, RoundTimes, RuleName
from services.drafter.control import rules as stop_rules
from services.drafter.control_files import load_weights
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine
from services.drafter.sources import DraftSource, LookupDrafts, NoDrafts
from services.drafter.sources.hidden import HiddenDrafts
from services.drafter.sources.registry import SOURCES
from services.tools.bench.draft.calibration import figures, plot
from services.tools.bench.draft.costs import DraftCosts, measure
from services.tools.bench.draft.one_process import shortened, tokens_per_second
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
from services.tools.local.folder import state_folder
from services.tools.training import shards
from services.tools.training.evaluate import Drafted, Summary, rounds
from services.tools.training.run import TrainingRun
from shared.engine import Engine
from shared.messages import HiddenFormat
from shared.models.folder import AUTO

NAMES = {name: SOURCES[name].token_sources for name in ("lookup", "hidden", "combined")}
RULES: tuple[tuple[RuleName, int], ...] = (
    ("fixed", 4),
    ("fixed", 8),
    ("entropy", 8),
    ("predictor", 8),
    ("marginal", 8),
)
PREPARED = (1, 8)
"""Outcomes for which drafts are prepared, of the sessions that `costs.PACKED` measures."""
REAL_TOKENS = 64
"""Tokens of each answer in the measurement of the real speed."""

Row = dict[str, Any]


class FixedTimes(RoundTimes):
    """The measured times, the same for every arm, with rounds that take `extra_ms` longer."""

    def __init__(self, measured: DraftCosts, extra_ms: float = 0.0) -> None:
        super().__init__()
        self._measured = measured
        self._extra_ms = extra_ms

    @property
    def base_ms(self) -> float:
        """Time of a round without draft tokens."""
        return self._measured.costs.round_ms + self._extra_ms

    def added_ms(self, count: int) -> float:
        """Return the time to verify `count` more tokens."""
        return count * self._measured.token_ms

    def step_ms(self, source: str) -> float:
        """Return the time to draft one token."""
        return self._measured.step_ms[1] if source == "hidden" else 0.0


class DraftBench:
    """Held-out texts, engines and measured costs that all tables share."""

    def __init__(self, run: TrainingRun, folder: HiddenDraftFolder, held_out: Path, prompts: int) -> None:
        texts = sorted(shards.load_all(held_out), key=lambda text: text.origin)
        self.texts = texts if not prompts else texts[: 3 * prompts]
        self.stop_ids = frozenset(run.target.eos_ids)
        self.weights: ControlWeights | None = load_weights(folder.controller) if folder.controller else None
        self.draft = DraftEngine(folder, run.target, threads=1, budget_tokens=1 << 16)
        self.model = run.target.name
        self.dtype = run.target.resolved(AUTO)
        self.engine = Engine(run.target.path, dtype=self.dtype, threads=1, budget_tokens=4096, keep_hidden=True)
        self.measured = measure(self.engine, self.draft, self.texts[0])

    def source(self, name: str) -> DraftSource:
        """Return a draft source without sessions."""
        if name == "lookup":
            return LookupDrafts()
        return NoDrafts() if name == "none" else HiddenDrafts(self.draft)

    def controller(self, rule: RuleName, length: int, extra_ms: float = 0.0) -> Controller:
        """Return a controller with the measured times."""
        return Controller(rule, length, self.weights, FixedTimes(self.measured, extra_ms))

    def rounds(self, name: str, rule: RuleName, length: int, extra_ms: float = 0.0, outcomes: int = 0) -> list[Drafted]:
        """Draft for all texts; return every round."""
        controller = self.controller(rule, length, extra_ms)
        return list(rounds(self.source(name), NAMES[name], controller, self.texts, outcomes=outcomes))

    def real(self, name: str, rule: RuleName, length: int, texts: Sequence[shards.GeneratedText]) -> list[float]:
        """Draft and verify texts; return the tokens per second of each. The controller learns its own times."""
        controller = Controller(rule, length, self.weights)
        source, names = self.source(name), NAMES.get(name, ())
        return [tokens_per_second(self.engine, source, names, controller, text, self.stop_ids) for text in texts]


def main(
    target: TargetFolderOption = None,
    draft: DraftFolderOption = None,
    run: RunFolderOption = None,
    prompts: Annotated[int, typer.Option(min=0, help="Number of prompts, for a quick look; 0 takes all.")] = 0,
    final: Annotated[
        bool, typer.Option("--final", help="Use the final prompts, which may not decide anything about a draft.")
    ] = False,
    real_texts: Annotated[
        int, typer.Option(min=1, help="Most texts that the target verifies, for the measured speed.")
    ] = 11,
) -> None:
    """Measure drafts on prompts that were never trained on."""
    with errors_shown():
        console = terminal()
        model = trained_target(target)
        folder = measured_draft(draft, model)
        texts = training_run(run, model)
        console.print("generating the held-out texts, unless an earlier run did (two minutes)", style="dim")
        bench = DraftBench(texts, folder, texts.evaluation_texts(lambda _: None, final=final), prompts)
        conclude(console, "draft", _measure(bench, folder, real_texts, console))


def _measure(bench: DraftBench, folder: HiddenDraftFolder, real_texts: int, console: Console) -> dict[str, Any]:
    """Measure and print every table; return the record of all."""
    measured = bench.measured
    _print(console, "Cost of a draft step", costs := _cost_rows(measured))
    arms, rows = _arms(bench)
    _print(console, "Rounds on held-out prompts", rows)
    for note in (notes := _against_fixed(rows)):
        console.print(note, highlight=False)
    kinds = _by_kind(arms, measured)
    _print(console, "hidden fixed(4), by text", [row for row in kinds if row["arm"] == "hidden fixed(4)"])
    _print(console, "marginal(8), by text: tokens a round, and expected speed", compared := _compared(kinds))
    _print(console, "Expected acceptance", calibration := _calibration(arms))
    picture = state_folder() / "results" / "reliability.svg"
    plot({name: arms[name] for name in ("combined fixed(4)", "combined marginal(8)")}, picture)
    console.print(f"reliability plot: {picture}", style="dim")
    _print(console, "Hidden states on the wire", wire := _wire(bench, arms["hidden fixed(4)"]))
    _print(console, "Drafts prepared while a round is in flight", ahead := _ahead(bench))
    title = f"Real speed in one process, {REAL_TOKENS} tokens each: tokens per second, and ratio to plain decoding"
    _print(console, title, real := _real(bench, real_texts))
    return {
        "facts": {**machine(), "model": bench.model, "dtype": bench.dtype, "threads": bench.engine.threads},
        "draft": str(folder.path),
        "texts": len(bench.texts),
        "costs": costs,
        "arms": rows,
        "against_fixed": notes,
        "kinds": kinds,
        "compared": compared,
        "calibration": calibration,
        "wire": wire,
        "ahead": ahead,
        "real": real,
    }


def _print(console: Console, title: str, rows: Sequence[Row]) -> None:
    console.print(table(title, list(rows[0]), [list(row.values()) for row in rows]))


def _cost_rows(measured: DraftCosts) -> list[Row]:
    steps: list[Row] = [
        {
            "step": f"draft step, {n} session{'s' * (n > 1)}",
            "ms": ms,
            "ms per token": ms / n,
            "of a target step": ms / n / measured.decode_ms,
        }
        for n, ms in measured.step_ms.items()
    ]
    decode, token = measured.decode_ms, measured.token_ms
    return [
        {"step": "target, decode one token", "ms": decode, "ms per token": decode, "of a target step": 1.0},
        {
            "step": "target, each further token verified",
            "ms": None,
            "ms per token": token,
            "of a target step": token / decode,
        },
        *steps,
    ]


def _arms(bench: DraftBench) -> tuple[dict[str, list[Drafted]], list[Row]]:
    arms: dict[str, list[Drafted]] = {}
    rows: list[Row] = []
    for name in NAMES:
        for rule, length in RULES:
            untrained = bench.weights is None or bench.weights.predictor is None
            traits, by_model = stop_rules.RULES[rule], SOURCES[name].needs_torch
            if (traits.needs_predictor and untrained) or (traits.reads_model_statistics and not by_model):
                continue
            drafted = bench.rounds(name, rule, length)
            arms[f"{name} {rule}({length})"] = drafted
            summary = Summary.of(drafted, bench.measured.costs, 4)
            chain = [*summary.by_position, None, None, None, None][:4]
            rows.append(
                {
                    "source": name,
                    "stop rule": f"{rule}({length})",
                    **{f"accepted {i + 1}": share for i, share in enumerate(chain)},
                    "tokens a round": summary.tokens_per_round,
                    "accepted share": summary.accepted_share,
                    "wasted": summary.wasted_share,
                    "draft length": summary.draft_length,
                    "expected speed": summary.speed,
                }
            )
    return arms, rows


def _against_fixed(rows: Sequence[Row]) -> list[str]:
    """Return the gains over fixed lengths, in the form of the paper's (+34 to 54 % and +20 to 30 %)."""
    found = {(row["source"], row["stop rule"]): row for row in rows}
    notes = []
    for source in ("hidden", "combined"):
        for rule in ("predictor(8)", "marginal(8)"):
            for fixed in ("fixed(4)", "fixed(8)"):
                if (source, rule) not in found:
                    continue
                ours, theirs = found[source, rule], found[source, fixed]
                share = ours["accepted share"] / theirs["accepted share"] - 1
                speed = ours["expected speed"] / theirs["expected speed"] - 1
                notes.append(
                    f"{source}, {rule} over {fixed}: accepted share {share:+.0%}, tokens per second {speed:+.0%}"
                )
    return notes


def _by_kind(arms: dict[str, list[Drafted]], measured: DraftCosts) -> list[Row]:
    rows: list[Row] = []
    for name, drafted in arms.items():
        groups: dict[str, list[Drafted]] = defaultdict(list)
        for one in drafted:
            groups[one.kind].append(one)
            groups[f"T = {one.temperature:g}"].append(one)
        for group in [*sorted(groups), "all"]:
            some = groups.get(group, drafted)
            summary = Summary.of(some, measured.costs, 4)
            rows.append(
                {
                    "arm": name,
                    "text": group,
                    "rounds": summary.rounds,
                    "accepted 1": summary.by_position[0] if summary.by_position else None,
                    "tokens a round": summary.tokens_per_round,
                    "draft length": summary.draft_length,
                    "expected speed": summary.speed,
                }
            )
    return rows


def _compared(kinds: Sequence[Row]) -> list[Row]:
    """Return the sources side by side, with the rule `marginal`."""
    found = {(row["arm"], row["text"]): row for row in kinds}
    texts = list(dict.fromkeys(row["text"] for row in kinds))
    arms = {name: f"{name} marginal(8)" for name in NAMES}
    return [
        {
            "text": text,
            **{name: found[arm, text]["tokens a round"] for name, arm in arms.items()},
            **{f"{name} speed": found[arm, text]["expected speed"] for name, arm in arms.items()},
        }
        for text in texts
        if all((arm, text) in found for arm in arms.values())
    ]


def _calibration(arms: dict[str, list[Drafted]]) -> list[Row]:
    rows: list[Row] = []
    for name, drafted in arms.items():
        if "fixed(4)" in name or "marginal" in name:
            area, error, count = figures(drafted)
            rows.append({"arm": name, "tokens": count, "AUC": area, "calibration error": error})
    return rows


def _wire(bench: DraftBench, exact: Sequence[Drafted]) -> list[Row]:
    """Return the bytes of hidden states, and the acceptance with half as many."""
    controller = bench.controller("fixed", 4)
    source = bench.source("hidden")
    coarse = list(rounds(source, NAMES["hidden"], controller, bench.texts, form=HiddenFormat.INT8))
    size = bench.draft.hidden_size
    prompt = statistics.fmean(text.prompt_len for text in bench.texts)
    found: list[Row] = []
    for form, drafted in ((HiddenFormat.BFLOAT16, exact), (HiddenFormat.INT8, coarse)):
        summary = Summary.of(drafted, bench.measured.costs, 4)
        row_bytes = size * form.width + (4 if form is HiddenFormat.INT8 else 0)
        found.append(
            {
                "format": form.value,
                "bytes per token": row_bytes,
                "bytes a round": row_bytes * summary.tokens_per_round,
                f"bytes of a prompt ({prompt:.0f} tokens)": row_bytes * prompt,
                "accepted 1": summary.by_position[0],
                "tokens a round": summary.tokens_per_round,
            }
        )
    return found


def _ahead(bench: DraftBench) -> list[Row]:
    """Return how often a draft prepared during the previous round is used, and the speed that it gains.

    The drafter is taken to have a core of its own. The time to prepare is that of the steps after the draft in flight.
    """
    rows: list[Row] = []
    for extra_ms in (0.0, 20.0, 100.0):
        measured = bench.measured.costs
        costs = type(measured)(measured.round_ms + extra_ms, measured.token_ms, measured.step_ms)
        without = Summary.of(bench.rounds("combined", "marginal", 8, extra_ms), costs)
        for outcomes in PREPARED:
            drafted = bench.rounds("combined", "marginal", 8, extra_ms, outcomes)
            with_it = Summary.of(drafted, costs)
            prepared = [d.steps for d in drafted if d.ahead]
            steps = statistics.fmean(prepared) if prepared else 0.0
            rows.append(
                {
                    "added round trip ms": extra_ms,
                    "outcomes": outcomes,
                    "rounds with a prepared draft": len(prepared) / len(drafted),
                    "time to prepare ms": measured.step_ms + steps * bench.measured.step_ms[outcomes],
                    "tokens a round without": without.tokens_per_round,
                    "with": with_it.tokens_per_round,
                    "speed against not preparing": with_it.speed / without.speed,
                }
            )
    return rows


def _real(bench: DraftBench, most: int) -> list[Row]:
    rows: list[Row] = []
    kinds = sorted({text.kind for text in bench.texts})
    for temperature in (0.0, 0.7, 1.0):
        texts = shortened(bench.texts, kinds, temperature, REAL_TOKENS)[:most]
        if not texts:
            continue
        plain = bench.real("none", "fixed", 0, texts)
        row: Row = {
            "temperature": temperature,
            "texts": len(texts),
            "plain tokens/s": statistics.median(plain),
        }
        for name in NAMES:
            speeds = bench.real(name, "marginal", 8, texts)
            row[name] = statistics.median(ours / theirs for ours, theirs in zip(speeds, plain, strict=True))
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_program(main, "wisp bench draft")
