"""The target's engine in the benchmark's own process: what plain decoding costs without the suite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from services.tools.bench.stream.core.speed import ENGINE
from services.tools.bench.stream.generated import Generated
from shared.engine import Engine, Step
from shared.engine.steps import ChoiceRow
from shared.messages import Sampling

SESSION = "answer"


class BareEngine:
    """The engine that verifiers use, with the same format of weights and as many threads."""

    arms = (ENGINE,)
    same_text = True

    def __init__(self, folder: Path, dtype: str, threads: int, cache_tokens: int) -> None:
        """cache_tokens: at least the longest prompt with its answer, in whole blocks.

        Raises ModelError and EngineError.
        """
        self._engine = Engine(folder, dtype=dtype, threads=threads, budget_tokens=cache_tokens)

    def generate(self, arm: str, prompt: Sequence[int], count: int, temperature: float, seed: int) -> Generated:
        """Generate `count` tokens as a verifier chooses them, one forward pass each."""
        started = time.perf_counter()
        engine, sampling, tokens = self._engine, Sampling(temperature=temperature, seed=seed), list(prompt)
        # Nothing is left of the answer before, as in the suite, whose cache another prompt has filled.
        engine.reset()
        engine.attach(SESSION, prompt)
        new, first_s = list(prompt), 0.0
        while len(tokens) < len(prompt) + count:
            output = engine.forward([Step(SESSION, new, rows=1)])
            new = output.choose([ChoiceRow(0, sampling, len(tokens), len(prompt))])
            tokens += new
            first_s = first_s or time.perf_counter() - started
        return Generated(tokens[len(prompt) :], first_s, 1, time.perf_counter() - started)
