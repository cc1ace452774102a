"""`wisp bench vocabulary`: drafts by models with other vocabularies than the target's, on small models trained for it.

The target and the drafts are trained on this program's own source files, each with its tokenizer. All drafts have the
same shape and see the same number of tokens. The texts are the target's continuations of files that nothing was
trained on. `--target` and `--draft` measure a pair of your own in their place.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from services.drafter.control import Controller
from services.drafter.sources import Draft, DraftRequest, DraftSource, pairing
from services.drafter.sources.model import ModelDrafts
from services.drafter.sources.registry import MODEL
from services.drafter.sources.translated import TranslatedDrafts
from services.tools.bench.support import pair
from services.tools.bench.support.options import run_program
from services.tools.bench.support.report import conclude, machine, table, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.training.answering import EngineTarget
from services.tools.training.evaluate import Costs, Drafted, Summary, rounds
from services.tools.training.generate import Assignment, generate
from services.tools.training.shards import GeneratedText
from shared.engine import Engine
from shared.errors import SettingsError
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

HELD_OUT = 10
"""Of so many files, one is not trained on."""
TARGET_STATES, DRAFT_STATES = 128, 64
PROMPT, ANSWER = 64, 96
TEMPERATURES = (0.0, 0.7, 1.0)
LENGTH = 4
NO_COSTS = Costs(1.0, 0.0, 0.0)

Row = dict[str, Any]


def source_files() -> list[str]:
    """Return the texts of a third of this program's own modules."""
    root = Path(pairing.__file__).parents[3]
    files = sorted([*(root / "services").rglob("*.py"), *(root / "shared").rglob("*.py")])[::3]
    return [text for text in (file.read_text(encoding="utf-8") for file in files) if len(text) > 1000]


def trained_pairs(folder: Path, steps: int, console: Console) -> tuple[ModelFolder, dict[str, ModelFolder], list[str]]:
    """Train the target and the drafts, unless they are in the folder.

    Returns them, and texts that nothing was trained on.
    """
    files = source_files()
    held_out, seen = files[::HELD_OUT], [text for i, text in enumerate(files) if i % HELD_OUT]
    tokenizers: dict[str, tuple[Callable[[Path, Sequence[str], int], int], int, int]] = {
        "target": (pair.byte_level, 2000, TARGET_STATES),
        "the target's": (pair.byte_level, 2000, DRAFT_STATES),
        "byte-level BPE, 4000 tokens": (pair.byte_level, 4000, DRAFT_STATES),
        "byte-level BPE, 1000 tokens": (pair.byte_level, 1000, DRAFT_STATES),
        "SentencePiece BPE, 2000 tokens": (pair.sentence_piece, 2000, DRAFT_STATES),
    }
    made: dict[str, ModelFolder] = {}
    for index, (name, (tokenizer, size, states)) in enumerate(tokenizers.items()):
        path = folder / str(index)
        if (path / "model.safetensors").is_file():
            made[name] = ModelFolder(path)
            continue
        console.print(f"training {name}", style="dim")
        # Drafts of another family know other texts: their tokenizers learn from every second file.
        tokenizer(path, seen if states == TARGET_STATES or index == 1 else seen[::2], size)
        layers = 3 if states == TARGET_STATES else 2
        pair.trained(path, seen, hidden=states, layers=layers, steps=steps, batch=8, seed=index)
        made[name] = ModelFolder(path)
    target = made.pop("target")
    return target, made, held_out


def answers(target: ModelFolder, passages: Sequence[str], texts: int) -> list[GeneratedText]:
    """Return the target's continuations of passages, drawn with the noise of serving."""
    tokenizer = Tokenizer(target)
    engine = Engine(target.path, threads=1, budget_tokens=1 << 14, keep_hidden=True)
    prompts = [ids[:PROMPT] for ids in map(tokenizer.encode_plain, passages) if len(ids) >= PROMPT][:texts]
    assignments = (
        Assignment(origin, "file", prompt, temperature, ANSWER)
        for origin, (prompt, temperature) in enumerate((p, t) for p in prompts for t in TEMPERATURES)
    )
    answering = EngineTarget(engine, 16)
    return list(generate(answering, assignments, frozenset(target.eos_ids), 0, serving_noise=True))


class _TimedSource:
    """A draft source, with the time that it takes."""

    def __init__(self, source: DraftSource) -> None:
        self._source = source
        self.blocking, self.computes, self.ahead = source.blocking, source.computes, source.ahead
        self.starts_at, self.close = source.starts_at, source.close
        self.s = 0.0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Draft, and add the time to `s`."""
        started = time.perf_counter()
        drafts = self._source.propose(requests)
        self.s += time.perf_counter() - started
        return drafts


def measured(name: str, draft: ModelFolder, target: ModelFolder, texts: Sequence[GeneratedText]) -> list[Row]:
    """Return the rounds of one draft model by temperature, one text at a time."""
    engine = Engine(draft.path, threads=1, budget_tokens=1 << 14)
    share = pairing.covered(draft, target)
    source = ModelDrafts(engine) if share is None else TranslatedDrafts(engine, pairing.translation(draft, target))
    timed = _TimedSource(source)
    drafted = [one for text in texts for one in rounds(timed, (MODEL,), Controller("fixed", LENGTH), [text])]
    per_round = timed.s / max(1, len(drafted)) * 1000
    return [
        {"draft's vocabulary": name, "covered": share, "T": label, **_figures(chosen), "ms a round": per_round}
        for label, chosen in _by_temperature(drafted)
    ]


def _by_temperature(drafted: Sequence[Drafted]) -> Iterator[tuple[str, list[Drafted]]]:
    for temperature in TEMPERATURES:
        yield f"{temperature:g}", [one for one in drafted if one.temperature == temperature]
    yield "all", list(drafted)


def _figures(drafted: Sequence[Drafted]) -> Row:
    if not drafted:
        return {"1st accepted": None, "2nd": None, "tokens a round": None}
    summary = Summary.of(drafted, NO_COSTS, 2)
    first, second = [*summary.by_position, None, None][:2]
    return {"1st accepted": first, "2nd": second, "tokens a round": summary.tokens_per_round}


def main(
    target: Annotated[Path | None, typer.Option(help="Folder of a target, in place of the trained one.")] = None,
    draft: Annotated[Path | None, typer.Option(help="Folder of a draft model for --target.")] = None,
    steps: Annotated[int, typer.Option(min=10, help="Steps of training of each model.")] = 300,
    folder: Annotated[Path | None, typer.Option(help="Folder that keeps the trained models.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Held-out files, each continued at three temperatures.")] = 24,
) -> None:
    """Measure drafts by models with other vocabularies than the target's."""
    with errors_shown(), tempfile.TemporaryDirectory() as temporary:
        if (target is None) is not (draft is None):
            raise SettingsError("--target and --draft name a pair: give both or none")
        console = terminal()
        torch.set_num_threads(1)
        if target is not None and draft is not None:
            wanted, drafts, passages = ModelFolder(target), {draft.name: ModelFolder(draft)}, source_files()[::HELD_OUT]
        else:
            wanted, drafts, passages = trained_pairs(folder or Path(temporary), steps, console)
        console.print("generating the texts", style="dim")
        generated = answers(wanted, passages, texts)
        rows = [row for name, each in drafts.items() for row in measured(name, each, wanted, generated)]
        console.print(table(f"Rounds of fixed({LENGTH})", list(rows[0]), [list(row.values()) for row in rows]))
        facts = {**machine(), "texts": len(generated)} | ({"steps": steps} if target is None else {})
        conclude(console, "vocabulary", {"facts": facts, "rows": rows})


if __name__ == "__main__":
    run_program(main, "wisp bench vocabulary")
