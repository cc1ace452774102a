"""The suite, and the baselines, on a twin: emulated models, everything else as it is."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from patience import HANG_S
from twins import make_twin

from services.tools.bench.gpu.random_models import configuration
from services.tools.bench.gpu.suite import ComputedTarget, measure_arm
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.results import MeasuredPoint
from services.tools.bench.load.lateness import EmulationLog
from services.tools.bench.twin.__main__ import TwinPlan
from services.tools.bench.twin.core.comparison import difference
from services.tools.local.brokers import Brokers
from services.tools.local.progress import Progress
from services.tools.local.service_commands import Serving
from services.tools.local.stack import Stack
from services.tools.simulator.arms import SCENARIOS, read
from services.tools.simulator.core.scenario import parse_scenario
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.twin.folder import TwinFolder
from shared.twin.text import SyntheticText

TOKENS = 40
SEEDS = (3, 4, 5)


def expected(twin: TwinFolder, seed: int) -> str:
    text = SyntheticText(twin.spec)
    return Tokenizer(ModelFolder(twin.path)).decode([text.token(seed, index) for index in range(TOKENS)])


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("serving", ["wisp", "centralized", "colocated"])
async def test_all_ways_of_serving_give_a_twin_s_answers(serving: Serving, brokers: Brokers, tmp_path: Path) -> None:
    twin = make_twin(tmp_path)
    stack = Stack(
        "test-twin",
        brokers=brokers,
        target=twin.path,
        serving=serving,
        env={"WISP_ADMISSION": "false", "WISP_STOP_RULE": "fixed", "WISP_DRAFT_LENGTH": "4"},
        env_of={"drafter": {"WISP_DEVICE_PROFILE": "laptop"}},
    )
    async with stack, httpx.AsyncClient(timeout=HANG_S) as http:
        for seed in SEEDS:
            body = {
                "model": "twin", "messages": [{"role": "user", "content": "Hello"}], "seed": seed,
                "max_tokens": TOKENS, "ignore_eos": True, "wisp": {"trace": True},
            }  # fmt: skip
            answer = (await http.post(f"{stack.url}/chat/completions", json=body)).raise_for_status().json()
            assert answer["choices"][0]["message"]["content"] == expected(twin, seed)
            drafted = answer["wisp"]["summary"]["drafted"]
            assert (drafted > 0) is (serving != "centralized"), "drafts"
        assert EmulationLog(stack.folder).take() is not None
        assert [process.name for process in stack.processes() if has_torch(process.pid)] == []


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["centralized", "edf"])
def test_twin_and_simulator_agree(arm: str, tmp_path: Path) -> None:
    """The full comparison is `wisp bench twin`; this one has few requests, and tests may run beside it."""
    make_twin(tmp_path, step_ms=30.0, cache_tokens=8192)
    changes = {
        "target": str(tmp_path / "profile.json"), "hop_ms": 2.0,
        "classes": [
            {"name": "all", "ttft_ms": 4000, "tpot_ms": 200}
            | {name: [{"distribution": "constant", "value": value}] for name, value in
               (("prompt_tokens", 120), ("output_tokens", 40))}
        ],
        "think_s": [{"distribution": "constant", "value": 0.2}],
    }  # fmt: skip
    spec = parse_scenario(read("paper-a100", SCENARIOS, ".yaml", "scenario"), "paper-a100", changes)
    plan = TwinPlan(spec, arm, [3], 1, Window(warm_up_s=3, measure_s=12, drain_s=HANG_S))
    campaign, [simulated] = plan.measure(tmp_path / "words", tmp_path, Progress())
    [twin] = campaign.results.points
    assert twin.measures.complete == twin.measures.requests > 10
    assert twin.late_share is not None
    if arm != "centralized":
        off = difference(twin, simulated, "tokens/round")
        assert off is not None
        assert abs(off) < 0.1
    off = difference(twin, simulated, "TPOT p50")
    assert off is not None
    # On a busy machine the emulation is late, says so, and is slower than the simulation.
    assert abs(off) < 0.25 or (not twin.follows and off > 0)


@pytest.mark.slow
def test_the_suite_is_measured_with_a_target_that_is_computed(target_folder: Path) -> None:
    """`wisp bench gpu --steps suite` on a CPU: a tiny target, and drafts of the shipped trace."""
    config = configuration("tiny") | {"max_position_embeddings": 8192}
    points: list[MeasuredPoint] = []
    model = ComputedTarget(config, target_folder, torch.device("cpu"))
    measure_arm("centralized", model, Window(warm_up_s=0, measure_s=1, drain_s=HANG_S), (1, 1), points.append)
    [point] = points
    assert (point.arm, point.sessions, point.measures.errors) == ("centralized", 1, 0)
    assert point.measures.complete == point.measures.requests > 0
    assert point.measures.tpot_ms is not None
    assert point.measures.tpot_ms.p50 > 0
