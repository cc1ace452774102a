"""Steps of `wisp bench gpu`, the most valuable first, and their sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

FORMS: Final = ("bfloat16", "float16", "float32")
MODELS: Final = ("smollm2-135m", "qwen3-8b")
KINDS: Final = ("exactness", "texts", "speed", "products", "calibration", "rivals", "suite")
DEFAULT_KINDS: Final = KINDS[:-1]
"""Kinds without the suite, which takes minutes for each way of serving, and needs brokers."""
ARMS: Final = ("centralized", "sled", "wisp+")
"""Arms of the suite's step: as in `wisp bench load`."""
NEW_TOKENS: Final = (1, 5, 9)
"""Tokens of a session in a step: decoding, and verification of 4 and 8 drafts."""
INTERPRETER_SLOWNESS: Final = 8.0
"""Limits of a tiny run / those on a GPU: a busy CPU also compiles the kernels for CPUs first."""
TABLES: Final[Mapping[str, tuple[str, list[str]]]] = {
    "exactness": (
        "Positions with other bits than one prefill has", ["model", "format", "way", "positions", "differing"]
    ),
    "texts": (
        "Texts under load against alone", ["model", "texts", "tokens", "differing texts", "differing states"]
    ),
    "speed": (
        "Steps in bfloat16",
        ["model", "sessions", "held", "new tokens", "step ms", "without graphs ms", "GB/s", "of copy %"],
    ),
    "products": (
        "Products in bfloat16 against cuBLAS", ["model", "inputs", "outputs", "rows", "µs", "cuBLAS µs", "price %"]
    ),
    "calibration": (
        "Cost models", ["model", "weights, millions", "batches", "error p50 %", "error p90 %", "file"]
    ),
    "rivals": (
        "transformers with SDPA, and with its static cache and torch.compile",
        ["model", "sessions", "held", "new tokens", "step ms", "transformers ms", "compiled ms", "price %"],
    ),
    "suite": (
        "The suite with random weights, and drafts of a trace",
        ["model", "arm", "sessions", "requests", "attained", "goodput", "tokens/s", "TPOT p50 ms", "late %"],
    ),
}  # fmt: skip
"""Title and columns of each kind's table."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Sizes of a measurement."""

    models: list[str]
    forms: list[str]
    calibrated: list[str]
    layers: int
    exact_sessions: int
    exact_length: int
    texts: int
    text_tokens: int
    sessions: list[int]
    context: int
    prompt: int
    repetitions: int
    copy_mb: int
    checked: int
    """Tokens of the check at load."""
    tiny: bool = False
    served: str = "qwen3-8b"
    """Shape of the suite's target."""
    arms: tuple[str, ...] = ARMS
    point_s: tuple[float, float, float] = (4.0, 15.0, 10.0)
    """Warm-up, window and longest drain of a point of the suite."""
    load: tuple[int, int] = (32, 256)
    """Sessions at which the search for the suite's capacity starts, and the most."""


TINY_PLAN: Final = GpuPlan(
    ["tiny"], ["bfloat16"], ["tiny"], 1, 2, 4, 2, 4, [2], 4, 8, 1, 1, 4, tiny=True,
    served="tiny", point_s=(0.0, 3.0, 30.0), load=(2, 2),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GpuStep:
    """A process of its own, so that neither a failure nor a standstill of the device ends the others."""

    kind: str
    model: str
    form: str = "bfloat16"
    limit_s: float = 60.0
    timed: bool = True
    """It measures times, so nothing runs beside it."""
    arm: str = ""
    """Way of serving, of a step of the suite."""

    @property
    def name(self) -> str:
        """Name of the step, of its rows' file and of its log."""
        parts = [self.kind, self.model, self.form if self.kind == "exactness" else "", self.arm]
        return "-".join(filter(None, parts))


def steps_of(plan: GpuPlan, kinds: Collection[str] = KINDS) -> list[GpuStep]:
    """Return the steps in their order. What measures no time comes first, and runs side by side."""
    found = [GpuStep("exactness", model, form, 170.0, timed=False) for form in plan.forms for model in plan.models]
    found.append(GpuStep("texts", "default", limit_s=120.0, timed=False))
    for kind, limit_s in (("speed", 90.0), ("products", 45.0)):
        found += [GpuStep(kind, model, limit_s=limit_s) for model in plan.models]
    found += [GpuStep("calibration", model, limit_s=110.0) for model in plan.calibrated]
    found += [GpuStep("rivals", model, limit_s=100.0) for model in reversed(plan.models)]
    found += [GpuStep("suite", plan.served, limit_s=185.0, arm=arm) for arm in plan.arms]
    slowness = INTERPRETER_SLOWNESS if plan.tiny else 1.0
    return [replace(step, limit_s=slowness * step.limit_s) for step in found if step.kind in kinds]
