"""`wisp bench edits`: tokens a round and speed of edits with and without `prediction`."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Sequence
from importlib import resources
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from services.drafter.control import Controller, ControlWeights, RuleName
from services.drafter.control_files import load_weights
from services.drafter.hidden.card import shipped_for
from services.tools.bench.edits.core.decoding import CopiedRound, copied_rounds
from services.tools.bench.edits.core.documents import Edit, edits
from services.tools.bench.support.options import TargetFolderOption, run_program
from services.tools.bench.support.report import conclude, machine, table, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.local.folder import state_folder
from services.tools.local.settings import DEFAULT_TARGET
from shared.engine import Engine, Step
from shared.messages import Sampling
from shared.models.folder import AUTO, ModelFolder
from shared.models.text import Tokenizer
from shared.sampling.sampler import choose

DRAFT_LENGTH = 8
ARMS: tuple[tuple[str, bool, RuleName, int], ...] = (
    ("no drafts", False, "fixed", 0),
    ("lookup, fixed(8)", False, "fixed", DRAFT_LENGTH),
    ("prediction, fixed(8)", True, "fixed", DRAFT_LENGTH),
    ("prediction, fixed(16)", True, "fixed", 2 * DRAFT_LENGTH),
)
"""Name, whether the text before the edit is predicted, stop rule and longest draft."""
REAL_ARMS: tuple[tuple[str, bool, RuleName, int], ...] = (
    ("no drafts", False, "fixed", 0),
    ("lookup", False, "marginal", DRAFT_LENGTH),
    ("prediction", True, "marginal", DRAFT_LENGTH),
)
"""The same for the measured speed, with the default stop rule."""

Row = dict[str, Any]


class TokenizedEdit:
    """An edit as token ids: the prompt with the instruction and the document, the document, and the edited one."""

    def __init__(self, edit: Edit, tokenizer: Tokenizer) -> None:
        self.edit = edit
        asked = f"{edit.instruction} Answer with the whole document.\n\n{edit.before}"
        self.prompt = tokenizer.render_chat([{"role": "user", "content": asked}])
        self.before = tokenizer.encode(edit.before)
        self.after = tokenizer.encode(edit.after)

    def predicted(self, wanted: bool) -> list[int] | None:
        """Return the prediction if it is wanted."""
        return self.before if wanted else None


def main(
    target: TargetFolderOption = None,
    real: Annotated[
        int, typer.Option(min=0, max=50, help="Edits that the target verifies, for the speed; 0 for none.")
    ] = 10,
) -> None:
    """Measure predicted outputs on 50 edits of code and text.

    The edited documents are given, and the rounds are those of a target that writes them. So the target need not be
    able to make the edits.
    """
    with errors_shown():
        console = terminal()
        model = ModelFolder(target or state_folder() / "models" / DEFAULT_TARGET)
        tokenizer = Tokenizer(model)
        tokenized = [TokenizedEdit(edit, tokenizer) for edit in packaged()]
        shown = _rounds(tokenized)
        console.print(table("Tokens a round on 50 edits", list(shown[0]), [list(row.values()) for row in shown]))
        record: dict[str, Any] = {
            "facts": {**machine(), "model": model.name, "dtype": model.resolved(AUTO)},
            "rounds": shown,
        }
        if real:
            shipped = shipped_for(model)
            weights = load_weights(shipped.controller) if shipped and shipped.controller else None
            record["real"] = speeds = _speeds(
                tokenized[:: max(1, len(tokenized) // real)][:real], model, weights, console
            )
            title = "Verified by the target: tokens per second, medians"
            console.print(table(title, list(speeds[0]), [list(row.values()) for row in speeds]))
        conclude(console, "edits", record)


def packaged() -> list[Edit]:
    """Return the packaged edits."""
    return list(edits(tomllib.loads((resources.files(__package__) / "edits.toml").read_text("utf-8"))))


def tokens_a_round(edit: TokenizedEdit, arm: tuple[str, bool, RuleName, int]) -> tuple[int, int]:
    """Return the number of tokens of an edited document, and the rounds that they take."""
    _, wanted, rule, length = arm
    rounds = list(copied_rounds(edit.prompt, edit.after, Controller(rule, length), edit.predicted(wanted)))
    return len(edit.after), len(rounds)


def _rounds(tokenized: Sequence[TokenizedEdit]) -> list[Row]:
    rows: list[Row] = []
    counts = {arm[0]: [tokens_a_round(edit, arm) for edit in tokenized] for arm in ARMS}
    for kind in ("code", "text", "all"):
        chosen = [i for i, edit in enumerate(tokenized) if kind in (edit.edit.kind, "all")]
        row: Row = {"text": kind, "edits": len(chosen)}
        row["tokens of an edit"] = sum(len(tokenized[i].after) for i in chosen) / len(chosen)
        for arm, counted in counts.items():
            row[arm] = sum(counted[i][0] for i in chosen) / sum(counted[i][1] for i in chosen)
        worst = [counts[ARMS[2][0]][i] for i in chosen]
        row["least of an edit, prediction, fixed(8)"] = min(tokens / rounds for tokens, rounds in worst)
        rows.append(row)
    return rows


def _speeds(
    tokenized: Sequence[TokenizedEdit], model: ModelFolder, weights: ControlWeights | None, console: Console
) -> list[Row]:
    engine = Engine(model.path, dtype=model.resolved(AUTO), threads=1, budget_tokens=4096)
    taken: dict[str, list[float]] = {name: [] for name, *_ in REAL_ARMS}
    for number, edit in enumerate(tokenized):
        console.print(f"verifying edit {number + 1} of {len(tokenized)}", style="dim")
        for name, wanted, rule, length in REAL_ARMS:
            seconds = _seconds(engine, edit, Controller(rule, length, weights), edit.predicted(wanted))
            taken[name].append(len(edit.after) / seconds)
    plain = taken[REAL_ARMS[0][0]]
    return [
        {
            "drafts": name,
            "edits": len(speeds),
            "tokens/s": median(speeds),
            "of plain decoding": median(ours / theirs for ours, theirs in zip(speeds, plain, strict=True)),
        }
        for name, speeds in taken.items()
    ]


def _seconds(engine: Engine, edit: TokenizedEdit, controller: Controller, predicted: Sequence[int] | None) -> float:
    """Return the time of an edit's rounds on the target, without its prompt."""
    whole = [*edit.prompt, *edit.after]
    engine.attach("edit", edit.prompt)
    engine.truncate("edit", 0)
    engine.forward([Step("edit", edit.prompt[:-1], rows=0)])

    def verify(round_: CopiedRound) -> float:
        started = time.perf_counter()
        tokens = [whole[round_.base_len - 1], *round_.draft]
        logits = engine.forward([Step("edit", tokens, rows=len(tokens))]).logits
        choose(logits, [Sampling()] * len(tokens), range(round_.base_len, round_.base_len + len(tokens)))
        engine.truncate("edit", round_.base_len + round_.accepted)
        return (time.perf_counter() - started) * 1000

    began = time.perf_counter()
    for _ in copied_rounds(edit.prompt, edit.after, controller, predicted, verify):
        pass
    elapsed = time.perf_counter() - began
    engine.release("edit")
    return elapsed


if __name__ == "__main__":
    run_program(main, "wisp bench edits")
