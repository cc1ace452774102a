"""transformers' `generate` as a competitor: plain, with prompt lookup, and with an assistant model.

No small model with the target's vocabulary is published, so the assistant is the target itself, cut after its first
layers: same embeddings, norm and head, no training. It is a weak assistant, because the missing layers produce the
input that the head expects; a distilled model of that size would be accepted far more often. It shows the cost and
gain of assisted generation without training. transformers controls it with its defaults: drafts of up to 20 tokens,
shorter where the assistant is unsure.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from services.tools.bench.stream.generated import Generated

PLAIN, LOOKUP, ASSISTANT = "generate", "generate, lookup", "generate, assistant"
LOOKUP_TOKENS = 4
ASSISTANT_LAYERS = 6
_CONFIG: Any = GenerationConfig


class _FirstTokenTimer(BaseStreamer):
    """Takes the time of the first tokens. The first value put is the prompt."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_s = 0.0
        self.first_tokens = 0
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
        elif not self.first_tokens:
            self.first_s = time.perf_counter() - self.started
            self.first_tokens = int(value.numel())

    def end(self) -> None:
        pass


class TransformersArms:
    """The target model in transformers, and the assistant. Takes one call at a time."""

    arms = (PLAIN, LOOKUP, ASSISTANT)
    same_text = False

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        quiet: Any = transformers.utils.logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        torch.set_num_threads(threads)
        form = torch.float32 if dtype == "float32" else torch.bfloat16
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=form)
        layers = min(ASSISTANT_LAYERS, self._model.config.num_hidden_layers)
        self._assistant: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=form, num_hidden_layers=layers)
        for model in (self._model, self._assistant):
            model.train(False)
            # The answer has as many tokens as the suite's, whatever tokens come.
            model.generation_config.eos_token_id = None
        self._extras: dict[str, dict[str, Any]] = {
            PLAIN: {},
            LOOKUP: {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
            ASSISTANT: {"assistant_model": self._assistant},
        }

    def generate(self, arm: str, prompt: Sequence[int], count: int, temperature: float, seed: int) -> Generated:
        """Generate exactly `count` tokens, greedily at temperature 0, otherwise sampled without top-k and top-p."""
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        mode = sampling if temperature > 0 else {"do_sample": False}
        config = _CONFIG(max_new_tokens=count, pad_token_id=0, **mode)
        ids = torch.tensor([list(prompt)])
        clock = _FirstTokenTimer()
        made = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=clock,
            **self._extras[arm],
        )
        total_s = time.perf_counter() - clock.started
        return Generated(made[0, len(prompt) :].tolist(), clock.first_s, clock.first_tokens, total_s)
