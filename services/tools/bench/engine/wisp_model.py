"""The engine as an arm."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from services.tools.bench.engine.arms import ArmSizes
from services.tools.bench.engine.core.cases import NEW_TOKENS, EngineCase
from services.tools.bench.engine.scores import Scores, scores
from shared.engine import Engine, Step
from shared.engine.blocks import block_names
from shared.kernels.layout import BLOCK

PROMPT = "prompt"
"""The session that is prefilled."""


class WispModel:
    """The engine, with sessions of different tokens."""

    def __init__(self, folder: Path, dtype: str, sizes: ArmSizes) -> None:
        """Raises ModelError and EngineError."""
        self._cached = sizes.cached
        longest = max(sizes.cached + NEW_TOKENS["verify 9"], BLOCK)
        budget = sizes.sessions * _whole_blocks(longest) + _whole_blocks(NEW_TOKENS["prefill"]) + 2 * BLOCK
        self._engine = Engine(folder, dtype=dtype, threads=sizes.threads, budget_tokens=budget)
        self.facts: dict[str, Any] = {"cache_mb": self._engine.budget_tokens // BLOCK * self._engine.block_bytes / 1e6}
        draw = random.Random(0)
        self._prompt = draw.choices(range(self._engine.vocab_size), k=NEW_TOKENS["prefill"])
        self._engine.attach(PROMPT, [])
        self._tokens = [draw.choices(range(self._engine.vocab_size), k=longest) for _ in range(sizes.sessions)]
        for session, tokens in enumerate(self._tokens):
            self._fill(str(session), tokens)

    def _fill(self, session_id: str, tokens: list[int]) -> None:
        """Cache the session's tokens. Whole blocks are copies of the first session's, which saves computing them."""
        engine, length = self._engine, self._cached
        for name, computed in zip(block_names(tokens[:length]), block_names(self._tokens[0][:length]), strict=True):
            content = engine.block(computed)
            if content is not None:
                engine.adopt(name, content)
        held = engine.attach(session_id, tokens[: length + 1])
        if held < length:
            engine.forward([Step(session_id, tokens[held:length], rows=0)])

    def once(self, case: EngineCase) -> float:
        """Return the milliseconds of one pass."""
        steps = []
        if case.operation == "prefill":
            self._engine.truncate(PROMPT, 0)
            steps.append(Step(PROMPT, self._prompt, case.rows))
        else:
            for session in range(case.sessions):
                self._engine.truncate(str(session), case.cached)
                new = self._tokens[session][case.cached : case.cached + case.new]
                steps.append(Step(str(session), new, case.rows))
        start = time.perf_counter()
        self._engine.forward(steps)
        return (time.perf_counter() - start) * 1000

    def score(self, tokens: list[int]) -> Scores:
        """Return how well the model predicts each token after the first; at most as many tokens as a prompt has."""
        self._engine.truncate(PROMPT, 0)
        logits = self._engine.forward([Step(PROMPT, tokens, rows=len(tokens))]).logits
        return scores(logits.float().numpy(), tokens)


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
