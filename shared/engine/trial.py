"""A trial of a model: how the engine computes it, found by loading it and computing a few tokens.

`python -m shared.engine.trial FOLDER [DTYPE]` prints the outcome as JSON, in a process of its own, whose memory is
free again afterwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from shared.engine.engine import Engine
from shared.engine.steps import Step
from shared.errors import EngineError, ModelError
from shared.kernels.layout import BLOCK


def main() -> None:
    """Print {"reason", "exact"} of the engine, or {"refusal"}.

    reason: that for taking module code, "" for the compiled pass. exact: whether bits are independent of the batch.
    """
    folder, dtype = Path(sys.argv[1]), (sys.argv[2:] or ["bfloat16"])[0]
    try:
        outcome: dict[str, object] = tried(folder, dtype)
    except (ModelError, EngineError) as error:
        outcome = {"refusal": str(error)}
    print(json.dumps(outcome))


def tried(folder: Path, dtype: str) -> dict[str, object]:
    """Load the model and compute a few tokens. Raises ModelError and EngineError."""
    engine = Engine(folder, dtype=dtype, budget_tokens=BLOCK)
    tokens = list(range(min(8, engine.vocab_size, engine.max_len)))
    engine.attach("trial", [])
    if not torch.isfinite(engine.forward([Step("trial", tokens, len(tokens))]).logits).all():
        raise ModelError(
            f"{folder}: the logits of the first tokens are not finite: the weights are damaged, or overflow in "
            f"{dtype}. Download the model again, or set WISP_DTYPE=float32."
        )
    return {"reason": engine.module_code_reason, "exact": engine.batch_invariant}


if __name__ == "__main__":
    main()
