"""transformers as an arm, with its own attention and cache.

All sessions of a pass have the same length, so it needs no padding and no masks: its best case. The time of growing its
DynamicCache by concatenation counts, the time of cropping it does not. The cached KV is random, which does not affect
the time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from services.tools.bench.engine.arms import ArmSizes
from services.tools.bench.engine.core.cases import EngineCase
from services.tools.bench.engine.scores import Scores, scores


class TransformersModel:
    """A model of transformers, with one cache for each number of sessions."""

    def __init__(self, folder: Path, dtype: str, sizes: ArmSizes) -> None:
        torch.set_num_threads(sizes.threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model.train(False)
        self._caches: dict[tuple[int, int], Any] = {}
        self.facts: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}

    @torch.inference_mode()
    def once(self, case: EngineCase) -> float:
        """Return the milliseconds of one pass."""
        cache = self._cache(case.sessions, case.cached)
        tokens = torch.randint(0, self._model.config.vocab_size, (case.sessions, case.new))
        start = time.perf_counter()
        self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=case.rows)
        took_ms = (time.perf_counter() - start) * 1000
        if case.cached:
            cache.crop(case.cached - cache.get_seq_length())
        return took_ms

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> Scores:
        """Return how well the model predicts each token after the first."""
        logits = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return scores(logits.float().numpy(), tokens)

    def _cache(self, sessions: int, length: int) -> Any:
        if not length:
            return DynamicCache(config=self._model.config)
        if (sessions, length) not in self._caches:
            self._caches[sessions, length] = self._filled(sessions, length)
        return self._caches[sessions, length]

    def _filled(self, sessions: int, length: int) -> Any:
        config = self._model.config
        cache = DynamicCache(config=config)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (sessions, config.num_key_value_heads, length, head_size)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self._model.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache
