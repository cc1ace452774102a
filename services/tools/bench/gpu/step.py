"""One step of `wisp bench gpu`, in a process of its own: `python -m services.tools.bench.gpu.step PLAN STEP ROWS`.

PLAN is a file with a `GpuPlan`, STEP a `GpuStep` in JSON. Rows go to the file ROWS, each at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from services.tools.bench.gpu.exactness import ExactnessCheck
from services.tools.bench.gpu.plan import NEW_TOKENS, GpuPlan, GpuStep
from services.tools.bench.gpu.random_models import RandomModel, configuration
from services.tools.bench.gpu.runner import Emit, RowWriter
from services.tools.bench.gpu.speed import (
    TransformersSteps,
    copied_gb_s,
    cublas_ms,
    kernel_step,
    product_ms,
    step_ms,
    valuable_first,
)
from services.tools.bench.gpu.texts import compared_texts
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.results import MeasuredPoint
from services.tools.bench.support.options import target_folder
from services.tools.bench.support.report import terminal
from services.tools.cli.terminal import stopped_by_signals
from services.tools.local.progress import ConsoleProgress
from shared.errors import WispError
from shared.gpu_kernels.check import settle
from shared.gpu_kernels.decoder import GpuDecoder
from shared.gpu_kernels.graphs import prepared_graphs
from shared.kernels.layout import BLOCK

PRODUCT_ROWS: Final = (1, 5, 32, 160, 512)
"""Decoding and verifying one session and 32, and a chunk of a prompt."""
CALIBRATION_S: Final = 30.0
TINY_CONTEXT: Final = 8192
"""Context of the tiny target of the suite: prompts have up to 4,096 tokens."""


def main() -> None:
    """Run the step that the arguments name."""
    plan = GpuPlan(**json.loads(Path(sys.argv[1]).read_text()))
    step = GpuStep(**json.loads(sys.argv[2]))
    rows = Path(sys.argv[3])
    try:
        with stopped_by_signals():
            MEASURES[step.kind](plan, step, RowWriter(rows))
    except WispError as error:
        sys.exit(" ".join(str(error).split()))  # one line, which the results keep


def _device(plan: GpuPlan) -> torch.device:
    return torch.device("cpu" if plan.tiny else "cuda")


def exactness(plan: GpuPlan, step: GpuStep, emit: Emit) -> None:
    """Compare the bits of all logits, however sessions are computed."""
    model = RandomModel(configuration(step.model, min(plan.layers, 2)))
    blocks = ExactnessCheck.blocks(plan.exact_sessions, plan.exact_length)
    decoder = _settled(plan, model, step.form, blocks)
    for one in ExactnessCheck(decoder, plan.exact_sessions, plan.exact_length).outcomes():
        emit("exactness", [step.model, step.form, one.way, one.positions, one.differing])


def texts(plan: GpuPlan, _step: GpuStep, emit: Emit) -> None:
    """Compare the default model's texts, and its states, alone and under load."""
    emit("texts", compared_texts(_device(plan), plan.texts, plan.text_tokens, quietly=plan.tiny))


def _speed_model(plan: GpuPlan, step: GpuStep) -> RandomModel:
    config = configuration(step.model)
    config["num_hidden_layers"] = min(config["num_hidden_layers"], plan.layers)
    return RandomModel(config)


def _shapes(plan: GpuPlan) -> list[tuple[int, int, int]]:
    """Return sessions, held and new tokens of each measured step."""
    rounds = [(sessions, plan.context, new) for sessions in plan.sessions for new in NEW_TOKENS]
    return valuable_first([*rounds, (1, 0, plan.prompt)])


def _decoder_for_speed(plan: GpuPlan, model: RandomModel) -> GpuDecoder:
    blocks = max(sessions * -(-(held + new) // BLOCK) for sessions, held, new in _shapes(plan))
    return _settled(plan, model, "bfloat16", blocks)


def speed(plan: GpuPlan, step: GpuStep, emit: Emit) -> None:
    """Measure steps with and without graphs, and the share of the memory's bandwidth."""
    device, model = _device(plan), _speed_model(plan, step)
    copied = copied_gb_s(device, plan.copy_mb)
    decoder = _decoder_for_speed(plan, model)
    config = model.config
    embedding = config["vocab_size"] * config["hidden_size"]
    token_kv = 2 * decoder.keys[:, :1, :, :1].numel()
    graphs = decoder.graphs
    for sessions, held, new in _shapes(plan):
        compute = kernel_step(decoder, sessions, held, new)
        own = step_ms(compute, device, plan.repetitions)
        decoder.graphs = None
        single = step_ms(compute, device, plan.repetitions)
        decoder.graphs = graphs
        rate = 2 * (model.parameters - embedding + token_kv * held * sessions) / own / 1e6
        emit("speed", [step.model, sessions, held, new, own, single, rate, 100 * rate / copied])


def products(plan: GpuPlan, step: GpuStep, emit: Emit) -> None:
    """Measure the products alone against cuBLAS, whose bits depend on the number of rows."""
    config = configuration(step.model, 1)
    decoder = _settled(plan, RandomModel(config), "bfloat16", 8)
    for product in decoder.products():
        for rows in PRODUCT_ROWS[: 1 if plan.tiny else None]:
            own = product_ms(decoder, product, rows, plan.repetitions)
            other = cublas_ms(product, rows, plan.repetitions)
            price = 100 * (own / other - 1)
            emit("products", [step.model, product.depth, product.outputs, rows, own * 1000, other * 1000, price])


def rivals(plan: GpuPlan, step: GpuStep, emit: Emit) -> None:
    """Measure the same steps by transformers. The price of exactness is against the faster of its ways."""
    device, model = _device(plan), _speed_model(plan, step)
    decoder = _decoder_for_speed(plan, model)
    rival = TransformersSteps(model.config, torch.bfloat16, device)
    for sessions, held, new in _shapes(plan):
        own = step_ms(kernel_step(decoder, sessions, held, new), device, plan.repetitions)
        other = step_ms(rival.step(sessions, held, new), device, plan.repetitions)
        compiled = None
        if new == 1 and sessions in (1, 32) and not plan.tiny:  # each shape takes half a minute to compile
            compiled = step_ms(rival.compiled_step(sessions, held, plan.repetitions + 2), device, plan.repetitions)
        best = min(other, compiled or other)
        emit("rivals", [step.model, sessions, held, new, own, other, compiled, 100 * (own / best - 1)])


def calibration(plan: GpuPlan, step: GpuStep, emit: Emit) -> None:
    """Measure the cost model of an architecture, and write its profile beside the rows."""
    from services.tools.twin.calibrate import calibrate

    folder = Path(sys.argv[3]).parent
    config = folder / f"{step.model}-config.json"
    config.write_text(json.dumps(configuration(step.model)))
    seconds = 1.0 if plan.tiny else CALIBRATION_S
    profile = calibrate(config, step.model, "bfloat16", _device(plan).type, 1, 0, seconds, ConsoleProgress(terminal()))
    path = folder / f"profile-{step.model}.json"
    path.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
    errors = 100 * profile.error_p50, 100 * profile.error_p90
    weights = round(profile.facts["weights"] / 1e6)
    emit("calibration", [step.model, weights, len(profile.batches), *errors, str(path)])


def suite(plan: GpuPlan, step: GpuStep, emit: Emit) -> None:
    """Measure the capacity of one way of serving, with a target that is computed here."""
    from services.tools.bench.gpu.suite import ComputedTarget, measure_arm

    def show(point: MeasuredPoint) -> None:
        found = point.measures
        tpot = found.tpot_ms.p50 if found.tpot_ms else None
        late = None if point.late_share is None else 100 * point.late_share
        counts = [point.sessions, found.requests, found.attained]
        emit("suite", [step.model, point.arm, *counts, found.goodput, found.throughput, tpot, late])

    config = configuration(step.model) | ({"max_position_embeddings": TINY_CONTEXT} if plan.tiny else {})
    tokenizer = target_folder(None, ConsoleProgress(terminal()))
    warm_up, measured, drain = plan.point_s
    window = Window(warm_up_s=warm_up, measure_s=measured, drain_s=drain)
    first, most = plan.load
    measure_arm(step.arm, ComputedTarget(config, tokenizer, _device(plan)), window, (first, most), show)


def _settled(plan: GpuPlan, model: RandomModel, form: str, blocks: int) -> GpuDecoder:
    """Return a decoder whose options are chosen as the engine does at load."""
    device = _device(plan)
    decoder = GpuDecoder(model.description, model.read, form=form, blocks=blocks, torch_device=device)
    settle(decoder, blocks, plan.checked, prepared_graphs if device.type == "cuda" else None)
    return decoder


Measure = Callable[[GpuPlan, GpuStep, Emit], None]
MEASURES: Final[Mapping[str, Measure]] = {
    "exactness": exactness, "texts": texts, "speed": speed, "products": products, "calibration": calibration,
    "rivals": rivals, "suite": suite,
}  # fmt: skip

if __name__ == "__main__":
    with torch.inference_mode():
        main()
