"""Times of steps and products, by the kernels and by transformers and cuBLAS."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.plan import ROW_TILE
from shared.gpu_kernels.products import DeviceProduct
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK

INNER = 20
"""Products between two points in time: one alone is shorter than its launch."""
MOST_VALUABLE = (1, 32)
"""Numbers of sessions that are measured first."""


def valuable_first(shapes: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return shapes (sessions, held tokens, new tokens) in the order of their value, if time should run out."""
    return sorted(shapes, key=lambda shape: (shape[0] not in MOST_VALUABLE, shape[2], shape[0]))


def step_ms(compute: Callable[[], object], torch_device: torch.device, repetitions: int) -> float:
    """Return the median time of a step in milliseconds, after two steps that do not count."""
    times = []
    for _ in range(repetitions + 2):
        _finish(torch_device)
        start = time.perf_counter()
        compute()
        _finish(torch_device)
        times.append(time.perf_counter() - start)
    return median(times[2:]) * 1000


def kernel_step(decoder: GpuDecoder, sessions: int, context: int, new: int) -> Callable[[], object]:
    """Return a step of sessions of `context` held tokens with `new` tokens each.

    All logits are wanted; of a prompt, which nothing is held of, only the last ones.
    """
    blocks = -(-(context + new) // BLOCK)
    tables = [list(range(number * blocks, (number + 1) * blocks)) for number in range(sessions)]
    batch = PackedBatch(tables, [context] * sessions, [new] * sessions)
    rows = sessions * new
    wanted = range(rows) if context else range(rows - 1, rows)
    return lambda: decoder.forward(batch, tokens=[1] * rows, wanted=wanted)


def product_ms(decoder: GpuDecoder, product: DeviceProduct, rows: int, repetitions: int) -> float:
    """Return the time of one of the kernels' products, with the tiles that a step of as many rows takes."""
    x = torch.ones(rows + -rows % ROW_TILE, product.depth, dtype=product.weight.dtype, device=product.weight.device)
    out = torch.empty(len(x), product.padded_outputs, device=x.device)
    return _many_ms(lambda: decoder.multiply_into(rows, x, product, out), x.device, repetitions)


def cublas_ms(product: DeviceProduct, rows: int, repetitions: int) -> float:
    """Return the time of torch's product of the same shape, which is cuBLAS's on a GPU."""
    x = torch.ones(rows, product.depth, dtype=product.weight.dtype, device=product.weight.device)
    return _many_ms(lambda: torch.nn.functional.linear(x, product.weight), x.device, repetitions)


def _many_ms(compute: Callable[[], object], torch_device: torch.device, repetitions: int) -> float:
    """Return the time of a short computation: on a GPU that of a graph of many, so that launches do not count."""
    if torch_device.type != "cuda":
        return step_ms(compute, torch_device, repetitions)
    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(INNER):
            compute()
    replay: Callable[[], object] = graph.replay
    return step_ms(replay, torch_device, repetitions) / INNER


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
        tokens = torch.ones(sessions, new, dtype=torch.long, device=self._torch_device)
        if context:
            self._hold(cache, sessions, context)

        @torch.inference_mode()
        def compute() -> None:
            if context:
                self._model(tokens, past_key_values=cache, use_cache=True)
                cache.crop(-new)
            else:  # a prompt
                self._model(tokens, use_cache=True, logits_to_keep=1)

        return compute

    def compiled_step(self, sessions: int, context: int, most: int) -> Callable[[], object]:
        """Return a step that decodes one token of each session, compiled with transformers' static cache.

        Each call appends a token, at most `most` times.
        """
        cache = StaticCache(config=self._model.config, max_cache_len=context + most)
        self._hold(cache, sessions, context)
        tokens = torch.ones(sessions, 1, dtype=torch.long, device=self._torch_device)
        compiled: Any = torch.compile(self._model, mode="reduce-overhead")

        @torch.inference_mode()
        def compute() -> None:
            compiled(tokens, past_key_values=cache, use_cache=True)

        return compute

    def _hold(self, cache: Any, sessions: int, context: int) -> None:
        held = torch.ones(sessions, context, dtype=torch.long, device=self._torch_device)
        with torch.inference_mode():
            self._model(held, past_key_values=cache, use_cache=True, logits_to_keep=1)


def copied_gb_s(torch_device: torch.device, megabytes: int) -> float:
    """Return the memory bandwidth that a copy reaches, reading and writing, in GB/s."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=torch_device)
    target = torch.empty_like(source)
    return 2 * source.numel() / step_ms(lambda: target.copy_(source), torch_device, 5) / 1e6


def _finish(torch_device: torch.device) -> None:
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)
