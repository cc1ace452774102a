"""Traces of models on this machine: records them with a target and its draft, and summarizes them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from services.drafter.control import ControlWeights
from services.drafter.control_files import load_weights
from services.drafter.hidden.card import CONTROLLER, SHIPPED, HiddenDraftFolder, shipped_for
from services.drafter.hidden.engine import DraftEngine
from services.drafter.sources.hidden import HiddenDrafts
from services.tools.bench.support.report import machine
from services.tools.local.folder import state_folder
from services.tools.local.progress import Progress
from services.tools.training import shards
from services.tools.training.config import Config
from services.tools.training.run import EVALUATED, TrainingRun
from services.tools.twin import recording
from services.tools.twin.fitting import ranking
from shared.errors import SettingsError
from shared.models.folder import ModelFolder
from shared.twin.trace import CHAINS, Trace

DEPTHS = (1, 2, 4, 8)
"""Depths whose acceptance a summary has."""


def recorded(
    folder: Path, draft: Path | None, prompts: int, threads: int, run: Path | None, progress: Progress
) -> tuple[Trace, ControlWeights]:
    """Record a trace; return it with the weights of the draft's controller. Raises WispError.

    folder: of the target. draft: folder of a draft; None for the shipped one. run: folder for texts and parts.
    """
    model = ModelFolder(folder)
    drafts = HiddenDraftFolder.open(draft) if draft else shipped_for(model)
    if drafts is None:
        raise SettingsError(f"no draft is shipped for {folder}; give the folder of one with --draft")
    config = Config.model_validate(
        {"generation": {"threads": threads, "sessions": 32}, "prompts": {"held_out": prompts}}
    )
    texts = TrainingRun(config, model, run or state_folder() / "traces" / f"{model.name}-{prompts}")
    with progress.step("answering held-out prompts") as step:
        made = 0

        def count(more: int) -> None:
            nonlocal made
            made += more
            step.detail(f"{made} tokens of {len(EVALUATED) * prompts} texts")

        texts.generate_held_out(texts.held_out, config.seed, count)
    answers = sorted(shards.load_all(texts.held_out), key=lambda text: text.origin)
    weights = load_weights(drafts.controller) if drafts.controller else ControlWeights()
    engine = DraftEngine(drafts, model, threads=threads, budget_tokens=1 << 16)
    facts = {
        "target": model.name, "dtype": "bfloat16", "draft": drafts.path.name, "vocabulary": model.vocab_fingerprint,
        "eos": list(model.eos_ids), "temperatures": list(EVALUATED), "date": datetime.now(UTC).date().isoformat(),
        "command": f"wisp trace record --prompts {prompts}", "processor": machine()["processor"],
    }  # fmt: skip
    parts = texts.folder / "trace.part"
    with progress.step("drafting at every position") as step:
        trace = recording.record(
            answers,
            lambda: HiddenDrafts(engine),
            weights,
            facts,
            parts,
            lambda done: step.detail(f"{done} of {len(answers)} texts"),
        )
        step.done(f"drafts at {len(trace.tokens)} positions of {trace.texts} texts")
    shutil.rmtree(parts)
    return trace, weights


def shipped_weights() -> ControlWeights:
    """Return the weights of the shipped draft's controller."""
    return load_weights(SHIPPED / "smollm2-135m-instruct" / CONTROLLER)


def summary(trace: Trace, weights: ControlWeights) -> tuple[list[str], list[list[str | int | float | None]]]:
    """Return columns and rows: acceptance by depth, and the AUC of the controller's estimates, by chain."""
    columns = ["chain", "drafts", *(f"accepted {depth}" for depth in DEPTHS), "AUC"]
    rows: list[list[str | int | float | None]] = []
    for name in CHAINS:
        judged, right = trace.judged(name), trace.correct(name)
        shares = [
            float(right[judged[:, depth - 1], depth - 1].mean()) if judged[:, depth - 1].any() else None
            for depth in DEPTHS
        ]
        area = None if name == "lookup" or not weights.acceptance else ranking(trace, name, weights)
        rows.append([name, int(judged[:, 0].sum()), *shares, area])
    return columns, rows
