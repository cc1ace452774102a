"""llama.cpp as an arm, through the C functions of llama-cpp-python.

Each sequence has a KV buffer of its own (llama.cpp's default), a rollback is `llama_memory_seq_rm`, and one
`llama_decode` computes all sequences of a pass. The time ends when the logits of all requested rows are there.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from services.tools.bench.engine.arms import ArmFailed, ArmSizes
from services.tools.bench.engine.core.cases import NEW_TOKENS, EngineCase
from services.tools.bench.engine.llama_package import package_folder
from services.tools.bench.engine.scores import Scores, scores

ROW = 256
"""llama.cpp rounds the length of a KV buffer up to a multiple of this."""


class LlamaModel:
    """A GGUF model in llama.cpp, with sequences of different tokens."""

    def __init__(self, file: Path, sizes: ArmSizes) -> None:
        """Raises ArmFailed."""
        sys.path.append(str(package_folder()))
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        # The package is not part of the environment, so nothing is known of its types.
        self._lib: Any = importlib.import_module("llama_cpp.llama_cpp")
        self._prompt_sequence = sizes.sessions
        self._context = self._open(file, sizes)
        self._memory = self._lib.llama_get_memory(self._context)
        self._batch = self._lib.llama_batch_init(self._most_tokens(sizes), 0, 1)
        self.facts: dict[str, Any] = {"llama-cpp-python": version("llama-cpp-python")}
        draw = random.Random(0)
        longest = max(sizes.cached + NEW_TOKENS["verify 9"], NEW_TOKENS["prefill"])
        self._tokens = [draw.choices(range(self._vocab_size), k=longest) for _ in range(sizes.sessions + 1)]
        for start in range(0, sizes.cached, NEW_TOKENS["prefill"]):
            end = min(sizes.cached, start + NEW_TOKENS["prefill"])
            self._decode([(0, start, self._tokens[0][start:end])], rows=1)
        for sequence in range(1, sizes.sessions):
            self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def _open(self, file: Path, sizes: ArmSizes) -> Any:
        lib = self._lib
        lib.llama_backend_init()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(os.fsencode(file), parameters)
        if not model:
            raise ArmFailed(f"llama.cpp cannot load {file}")
        self._vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        wanted = lib.llama_context_default_params()
        wanted.n_seq_max = sizes.sessions + 1
        longest = max(sizes.cached + NEW_TOKENS["verify 9"], NEW_TOKENS["prefill"])
        wanted.n_ctx = wanted.n_seq_max * -(-longest // ROW) * ROW
        wanted.n_batch = self._most_tokens(sizes)
        wanted.n_threads = wanted.n_threads_batch = sizes.threads
        context = lib.llama_init_from_model(model, wanted)
        if not context:
            raise ArmFailed(f"llama.cpp cannot make a context of {wanted.n_ctx} tokens for {file}")
        return context

    def _most_tokens(self, sizes: ArmSizes) -> int:
        return max(NEW_TOKENS["prefill"], sizes.sessions * NEW_TOKENS["verify 9"])

    def once(self, case: EngineCase) -> float:
        """Return the milliseconds of one pass."""
        first = self._prompt_sequence if case.operation == "prefill" else 0
        parts = []
        for sequence in range(first, first + case.sessions):
            if not self._lib.llama_memory_seq_rm(self._memory, sequence, case.cached, -1):
                raise ArmFailed("llama.cpp cannot roll a sequence back")
            parts.append((sequence, case.cached, self._tokens[sequence][case.cached : case.cached + case.new]))
        return self._decode(parts, case.rows)

    def score(self, tokens: list[int]) -> Scores:
        """Return how well the model predicts each token after the first; at most as many tokens as a prompt has."""
        self._lib.llama_memory_seq_rm(self._memory, self._prompt_sequence, 0, -1)
        self._decode([(self._prompt_sequence, 0, tokens)], rows=len(tokens))
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(tokens), self._vocab_size))
        return scores(logits, tokens)

    def _decode(self, parts: Sequence[tuple[int, int, Sequence[int]]], rows: int) -> float:
        """Compute tokens of some sequences, each (sequence, first position, tokens); return the milliseconds."""
        batch, count = self._batch, 0
        for sequence, start, tokens in parts:
            for offset, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = start + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = offset >= len(tokens) - rows
                count += 1
        batch.n_tokens = count
        started = time.perf_counter()
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_synchronize(self._context)
        took_ms = (time.perf_counter() - started) * 1000
        if status:
            raise ArmFailed(f"llama_decode returns {status}")
        return took_ms
