"""Time of a step of many sessions, by the kernels and by transformers with SDPA."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from shared.gpu_kernels.decoder import GpuDecoder
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK


def step_ms(compute: Callable[[], object], torch_device: torch.device, repetitions: int) -> float:
    """Return the median time of a step, computed to its end, after two that are not counted."""
    times = []
    for _ in range(repetitions + 2):
        _finish(torch_device)
        start = time.perf_counter()
        compute()
        _finish(torch_device)
        times.append(time.perf_counter() - start)
    return median(times[2:]) * 1000


def kernel_step(decoder: GpuDecoder, sessions: int, context: int, new: int) -> Callable[[], object]:
    """Return a step of sessions of `context` held tokens with `new` tokens each, whose logits are all wanted."""
    blocks = -(-(context + new) // BLOCK)
    tables = [list(range(number * blocks, (number + 1) * blocks)) for number in range(sessions)]
    batch = PackedBatch(tables, [context] * sessions, [new] * sessions)
    rows = sessions * new
    return lambda: decoder.forward(batch, tokens=[1] * rows, wanted=range(rows))


class TransformersSteps:
    """The same steps by transformers' own model with random weights, SDPA, and a batch without padding."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, torch_device: torch.device) -> None:
        options = AutoConfig.for_model(**config)
        auto_class: Any = AutoModelForCausalLM
        with torch_device:
            model = auto_class.from_config(options, dtype=dtype, attn_implementation="sdpa")
        self._model, self._torch_device = model.eval(), torch_device

    def step(self, sessions: int, context: int, new: int) -> Callable[[], object]:
        """Return a step as `kernel_step`."""
        cache = DynamicCache(config=self._model.config)
        held = torch.ones(sessions, context, dtype=torch.long, device=self._torch_device)
        with torch.inference_mode():
            self._model(held, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = held[:, :new]

        @torch.inference_mode()
        def compute() -> None:
            self._model(tokens, past_key_values=cache, use_cache=True)
            cache.crop(-new)

        return compute


def copied_gb_s(torch_device: torch.device, megabytes: int) -> float:
    """Return the memory bandwidth that a copy reaches, reading and writing, in GB/s."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=torch_device)
    target = torch.empty_like(source)
    return 2 * source.numel() / step_ms(lambda: target.copy_(source), torch_device, 5) / 1e6


def _finish(torch_device: torch.device) -> None:
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)
