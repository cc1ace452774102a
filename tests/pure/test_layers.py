"""What may import what: no torch where none is needed, and no I/O in the code that decides."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECIDING = [
    "services/baseline/core/batching.py",
    "services/baseline/link.py",
    "services/tools/bench/autoscaling.py",
    "services/tools/bench/chaos/faults.py",
    "services/tools/bench/chaos/requests.py",
    "services/tools/bench/load/arms.py",
    "services/tools/bench/load/measures.py",
    "services/tools/bench/load/prompts.py",
    "services/tools/bench/load/record.py",
    "services/tools/bench/load/requests.py",
    "services/tools/bench/load/results.py",
    "services/tools/bench/load/search.py",
    "services/tools/bench/load/workload.py",
    "services/tools/cli/top/snapshot.py",
    "services/tools/cli/top/state.py",
    "services/tools/cli/top/view.py",
    "services/tools/cli/top/where.py",
    "services/drafter/control/calibration.py",
    "services/drafter/control/controller.py",
    "services/drafter/control/features.py",
    "services/drafter/control/guess.py",
    "services/drafter/control/pace.py",
    "services/drafter/control/rounds.py",
    "services/drafter/control/rules.py",
    "services/drafter/control/weights.py",
    "services/drafter/core/device.py",
    "services/drafter/hidden/model.py",
    "services/drafter/hidden/rows.py",
    "services/drafter/core/session.py",
    "services/drafter/core/timeout.py",
    "services/drafter/sources/base.py",
    "services/drafter/sources/guesses.py",
    "services/drafter/sources/hidden.py",
    "services/drafter/sources/lookup.py",
    "services/drafter/sources/model.py",
    "services/drain_order/core/order.py",
    "services/gateway/core/admission.py",
    "services/gateway/core/keys.py",
    "services/gateway/core/place.py",
    "services/gateway/core/slo.py",
    "services/tools/replayer/arrivals.py",
    "services/tools/replayer/choice.py",
    "services/tools/replayer/concern.py",
    "services/tools/replayer/figures.py",
    "services/tools/replayer/files.py",
    "services/tools/replayer/life.py",
    "services/tools/replayer/recording.py",
    "services/tools/replayer/redact.py",
    "services/tools/replayer/requests.py",
    "services/tools/replayer/timeline.py",
    "services/tools/replayer/trace.py",
    "services/tools/replayer/whatif.py",
    "services/tools/replayer/work.py",
    "services/scheduler/core/batching.py",
    "services/scheduler/core/dispatch.py",
    "services/scheduler/core/fleet.py",
    "services/scheduler/core/gate.py",
    "services/scheduler/core/load.py",
    "services/scheduler/core/pacing.py",
    "services/scheduler/core/placement.py",
    "services/scheduler/core/policies.py",
    "services/scheduler/core/pool.py",
    "services/scheduler/core/tally.py",
    "services/scheduler/core/waiting.py",
    "services/verifier/core/acceptance.py",
    "services/verifier/core/emulation.py",
    "services/verifier/replies.py",
    "services/verifier/core/worth.py",
    "shared/broker/access.py",
    "shared/cost/model.py",
    "shared/cost/fit.py",
    "shared/models/hidden_states.py",
    "shared/messages.py",
    "shared/broker/seal.py",
    "shared/slo.py",
    "shared/broker/topology.py",
]
TALKING = {"aio_pika", "redis", "asyncio", "time", "os", "socket", "fastapi", "structlog", "shared.broker.client"}


@pytest.mark.parametrize("service", ["gateway", "scheduler", "estimator", "drafter"])
def test_a_service_without_a_model_starts_without_torch(service: str) -> None:
    code = f"import sys, services.{service}.service; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_only_what_people_read_comes_from_a_wall_clock() -> None:
    """Clocks of hosts differ and jump. Times that matter are durations, or Redis's clock."""
    shown = {"services/gateway/app.py", "shared/models/chat.py", "shared/models/folder.py"}
    readers = set()
    for path in [*(ROOT / "shared").rglob("*.py"), *(ROOT / "services").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        if name.startswith("services/tools/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            imported = (
                isinstance(node, ast.ImportFrom) and node.module == "time" and "time" in [n.name for n in node.names]
            )
            if imported or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now")):
                readers.add(name)
    assert readers == shown


@pytest.mark.parametrize("path", DECIDING)
def test_deciding_code_neither_talks_nor_reads_a_clock(path: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    talks = {name for name in imported if name in TALKING or name.split(".")[0] in TALKING}
    assert talks == set()
