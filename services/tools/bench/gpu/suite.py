"""The suite itself on a GPU: twins whose steps a model of random weights really computes, under the load of sessions.

Gateway, drafters, scheduler, estimator and verifier, or the baseline, are the real ones, and so are RabbitMQ and Redis.
Answers and drafts come from the shipped trace, since random weights would accept no draft. Requests and devices are
those of a scenario of `wisp simulate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from services.tools.bench.gpu.verdict import CAPACITY_AIM
from services.tools.bench.load.arms import arms_of
from services.tools.bench.load.campaign import ArmSettings, Campaign, CapacitySearch, LoadPlan
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.results import MeasuredPoint
from services.tools.bench.twin.load import load_of, service_settings, write_devices
from services.tools.cli.terminal import run
from services.tools.local.progress import Progress
from services.tools.simulator.arms import SCENARIOS, read
from services.tools.simulator.core.scenario import parse_scenario
from services.tools.twin.calibrate import kv_tokens_of
from services.tools.twin.random_model import random_model, roomy_folder
from shared.kernels.layout import BLOCK
from shared.models.folder import ModelFolder
from shared.twin.files import trace_path
from shared.twin.folder import write_twin

SCENARIO: Final = "h100-32b"
"""Gives requests, their promises, devices and links."""
PROFILE: Final = "h100-qwen3-8b"
"""Profile of the twin. Its times are not used: the steps are computed."""
TRACE: Final = "smollm2-135m"
SEED: Final = 1
TOLERANCE: Final = 0.25
"""Resolution of the search for the capacity, as a share of it."""
MOST_KV_TOKENS: Final = 262_144
"""KV budget of every arm, if the GPU has the memory: what 256 sessions of the scenario hold."""
KV_SHARE: Final = 0.8
"""Share of the memory beside the weights that KV gets; graphs and buffers take of the rest."""
GPU_MEMORY: Final = "0.95"
CPU_KV_TOKENS: Final = 16_384


@dataclass(frozen=True, slots=True)
class ComputedTarget:
    """The target of the suite."""

    config: dict[str, Any]
    """Its config.json."""
    tokenizer: Path
    """Folder of the model of the trace, whose tokens answers consist of."""
    torch_device: torch.device


def measure_arm(
    arm: str, model: ComputedTarget, window: Window, load: tuple[int, int], show: Callable[[MeasuredPoint], None]
) -> None:
    """Search for the capacity of an arm. load: sessions at which the search starts, and the most. show: called with
    each point.

    Raises WispError, for example if there is no RabbitMQ.
    """
    config = model.config | {"vocab_size": max(model.config["vocab_size"], ModelFolder(model.tokenizer).vocab_size)}
    scenario = parse_scenario(read(SCENARIO, SCENARIOS, ".yaml", "scenario"), SCENARIO, {"target": PROFILE})
    with roomy_folder("wisp-suite-") as made:
        described = made / "config.json"
        described.write_text(json.dumps(config))
        weights = random_model(described, made / "model")
        twin = write_twin(
            PROFILE, model.tokenizer, made / "twin", trace=trace_path(TRACE), computed=made / "model"
        ).path
        env_of = service_settings(scenario)
        for service in ("verifier", "baseline"):
            env_of.setdefault(service, {}).update(WISP_DEVICE=str(model.torch_device), WISP_GPU_MEMORY=GPU_MEMORY)
        settings = ArmSettings(
            twin,
            "bfloat16",
            _kv_tokens(model, weights, config),
            admission=False,
            device_profiles=write_devices(scenario, made),
            env_of=env_of,
        )
        workload, requests = load_of(scenario, SEED, twin)
        plan = LoadPlan(
            arms_of(arm), [], CapacitySearch(*load, TOLERANCE, [CAPACITY_AIM]), 1, window, workload, requests
        )
        campaign = Campaign(plan, Progress(), show)
        run(lambda: campaign.run_arms(settings))


def _kv_tokens(model: ComputedTarget, weights: int, config: dict[str, Any]) -> int:
    """Return the KV budget of every arm."""
    if model.torch_device.type != "cuda":
        return CPU_KV_TOKENS
    room = int(KV_SHARE * kv_tokens_of(str(model.torch_device), weights, 2.0, config))
    return min(MOST_KV_TOKENS, room // BLOCK * BLOCK)
