"""Memory that a model's weights take in a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from services.tools.bench.engine.arms import ArmSizes
from services.tools.bench.engine.core.cases import cases
from services.tools.bench.engine.wisp_model import WispModel
from services.tools.bench.support.tiny import tiny_model


def with_memory(dtype: str, make: Callable[[], WispModel]) -> WispModel:
    """Load a model and add `weights_mb` to its facts: the growth of the process, without the KV cache.

    A tiny model is computed before, so that libraries and compiled kernels do not count.
    """
    sizes = ArmSizes(threads=1, cached=64, sessions=1)
    with TemporaryDirectory(prefix="wisp-bench-") as folder:
        _compute(WispModel(tiny_model(Path(folder)), "int8" if dtype == "gguf" else dtype, sizes), sizes)
        before = _resident_mb()
        model = make()
        _compute(model, sizes)
        model.facts["weights_mb"] = _resident_mb() - before - model.facts["cache_mb"]
    return model


def _compute(model: WispModel, sizes: ArmSizes) -> None:
    for case in cases([], sizes.cached):
        model.once(case)


def _resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6
