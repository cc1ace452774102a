"""Write shared/engine/MODELS.md: what the engine does with a tiny model of every type of transformers.

`python tests/model_table.py` takes some ten minutes; with names of model types it prints their rows only. Each type is
tried in its default layout, in float32 and bfloat16, and compared with transformers: three sessions in packed steps of
random lengths, longer than windows and chunks.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from architectures import alone_logits, expected_logits, model_types, packed_logits, random_texts, save

from shared.engine import Engine
from shared.errors import ModelError

PAGE = Path(__file__).parents[1] / "shared" / "engine" / "MODELS.md"
TEXTS = random_texts(3, 60)
TOLERANCE = 1e-3
"""Most difference of logits from those of transformers in float32, as a share of their spread."""

COMPILED, EXACT, RUNS, REFUSED, UNTRIED = "compiled", "exact", "runs", "refused", "untried"


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome of one model type."""

    model_type: str
    outcome: str
    reason: str = ""


def tried(model_type: str) -> Row:
    """Try a model type. Raises AssertionError for wrong logits, or a claim that does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save(Path(folder), model_type)
            expected = expected_logits(Path(folder), TEXTS)
        except Exception as error:  # transformers has hundreds of types, each with limits of its own
            return Row(model_type, UNTRIED, _first_line(error))
        exact = True
        for dtype in ("float32", "bfloat16"):
            try:
                engine = Engine(Path(folder), dtype=dtype, budget_tokens=512)
            except ModelError as error:
                reason = str(error).partition("cannot be served: ")[2] or str(error).replace(f"{folder}: ", "")
                reason = reason.partition(". Choose")[0].partition(". Name")[0]
                return Row(model_type, REFUSED, _first_line(reason))
            if dtype == "float32":
                _compare(model_type, packed_logits(engine, TEXTS), expected)
            if engine.batch_invariant:
                _compare_bits(f"{model_type} in {dtype}", engine)
            exact &= engine.batch_invariant
        if not engine.module_code_reason:
            return Row(model_type, COMPILED)
        return Row(model_type, EXACT if exact else RUNS)


def _compare(name: str, packed: list[torch.Tensor], expected: torch.Tensor) -> None:
    for logits, wanted in zip(packed, expected, strict=True):
        off = ((logits - wanted).square().mean(-1).sqrt() / wanted.std(-1)).max()
        assert off < TOLERANCE, f"{name}: logits differ from those of transformers by {off:.1%} of their spread"


def _compare_bits(name: str, engine: Engine) -> None:
    for text, logits in zip(TEXTS, packed_logits(engine, TEXTS), strict=True):
        assert torch.equal(alone_logits(engine, text), logits), f"{name}: bits depend on the batch"


def _first_line(reason: object) -> str:
    line = str(reason).strip().partition("\n")[0].replace("|", "/")
    return textwrap.shorten(line, 160, placeholder=" …")


PAGE_TEXT = """# Models

The {count} model types of transformers {version} that generate text, each tried as a tiny random model.
`python tests/model_table.py` writes this page: it compares packed sessions with transformers' own results, and the bits
of sessions alone and among others. A folder's `config.json` names its `model_type`. Options that the trial did not have
can change the outcome, so every model that module code computes is checked when it is loaded
([the engine](README.md#module-code)).

| outcome | model types |
|---|---|
| compiled pass: the same bits on every CPU | {compiled} |
| module code: on a CPU the same bits in any batch | {exact} |
| module code: bits can depend on the batch | {runs} |

Refused at load:

| model type | reason |
|---|---|
{refused}

Not tried, as transformers makes no tiny model of them here, or does not compute one without other inputs:
{untried}.
"""


def page(rows: list[Row]) -> str:
    """Return the page of these rows."""

    def names(outcome: str) -> str:
        return ", ".join(f"`{row.model_type}`" for row in rows if row.outcome == outcome) or "none"

    return PAGE_TEXT.format(
        count=len(rows),
        version=transformers.__version__,
        compiled=names(COMPILED),
        exact=names(EXACT),
        runs=names(RUNS),
        refused="\n".join(f"| `{row.model_type}` | {row.reason} |" for row in rows if row.outcome == REFUSED),
        untried=textwrap.fill(names(UNTRIED), 119, break_on_hyphens=False),
    )


def main() -> None:
    """Try the model types named on the command line, or all, and write the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows, wrong = [], []
    for model_type in sys.argv[1:] or model_types():
        try:
            rows.append(tried(model_type))
            print(f"{model_type}: {rows[-1].outcome} {rows[-1].reason}", flush=True)
        except AssertionError as error:
            wrong.append(str(error))
            print(f"WRONG {error}", flush=True)
    if wrong:
        sys.exit("\n".join(["The page is not written:", *wrong]))
    if not sys.argv[1:]:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
