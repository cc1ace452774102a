"""The process of an arm: loads its model, fills its cache, and times cases on request.

The arm is the first argument, as `arms.ArmProcess` writes it. Requests are lines of JSON on stdin, answers on stdout;
everything that libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

from services.tools.bench.engine.arms import ArmSizes
from services.tools.bench.engine.core.cases import EngineCase
from services.tools.bench.engine.scores import Scores
from services.tools.bench.support.options import let_idle_threads_sleep


class ArmModel(Protocol):
    """A loaded model with filled sessions."""

    facts: dict[str, Any]

    def once(self, case: EngineCase) -> float:
        """Return the milliseconds of one pass. Before it, each session has `case.cached` cached tokens."""
        ...

    def score(self, tokens: list[int]) -> Scores:
        """Return how well the model predicts each token of a text after the first."""
        ...


def main() -> None:
    """Serve the parent process until it closes stdin."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    message = json.loads(sys.argv[1])
    try:
        model = load(message)
    except Exception as error:  # of any library: the parent goes on without this arm
        _send(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(answers, model.facts)
    for line in sys.stdin:
        _send(answers, answer(model, json.loads(line)))


def load(message: dict[str, Any]) -> ArmModel:
    """Load the arm's model. Imports only what this arm needs."""
    sizes = ArmSizes(message["threads"], message["cached"], message["sessions"])
    path = Path(message["model"])
    if message["program"] == "wisp":
        let_idle_threads_sleep()  # as in the services
        from services.tools.bench.engine.wisp_model import WispModel

        make: Callable[[], WispModel] = lambda: WispModel(path, message["format"], sizes)  # noqa: E731
        if message["measure_memory"]:
            from services.tools.bench.engine.memory import with_memory

            return with_memory(message["format"], make)
        return make()
    if message["program"] == "transformers":
        from services.tools.bench.engine.transformers_model import TransformersModel

        return TransformersModel(path, message["format"], sizes)
    from services.tools.bench.engine.llama_model import LlamaModel

    return LlamaModel(path, sizes)


def answer(model: ArmModel, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    if "score" in request:
        losses, choices = model.score(request["score"])
        return {"losses": losses, "choices": choices}
    case = EngineCase(**request["case"])
    for _ in range(case.warm_passes):
        model.once(case)
    return {"ms": median(model.once(case) for _ in range(case.timed_passes))}


def _send(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
