"""What may import what: no torch where none is needed, and no I/O in the code that decides."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECIDING = [
    "services/baseline/batching.py",
    "services/baseline/link.py",
    "services/bench/autoscaling.py",
    "services/bench/chaos/faults.py",
    "services/bench/chaos/requests.py",
    "services/bench/load/arms.py",
    "services/bench/load/measures.py",
    "services/bench/load/prompts.py",
    "services/bench/load/record.py",
    "services/bench/load/requests.py",
    "services/bench/load/results.py",
    "services/bench/load/search.py",
    "services/bench/load/workload.py",
    "services/cli/top_snapshot.py",
    "services/cli/top_state.py",
    "services/cli/top_view.py",
    "services/cli/top_where.py",
    "services/drafter/control/calibration.py",
    "services/drafter/control/controller.py",
    "services/drafter/control/features.py",
    "services/drafter/control/guess.py",
    "services/drafter/control/pace.py",
    "services/drafter/control/rounds.py",
    "services/drafter/control/rules.py",
    "services/drafter/control/weights.py",
    "services/drafter/device.py",
    "services/drafter/hidden/model.py",
    "services/drafter/hidden/rows.py",
    "services/drafter/session.py",
    "services/drafter/timeout.py",
    "services/drafter/sources/base.py",
    "services/drafter/sources/guesses.py",
    "services/drafter/sources/hidden.py",
    "services/drafter/sources/lookup.py",
    "services/drafter/sources/model.py",
    "services/drainorder/order.py",
    "services/gateway/admission.py",
    "services/gateway/keys.py",
    "services/gateway/place.py",
    "services/gateway/slo.py",
    "services/replayer/arrivals.py",
    "services/replayer/choice.py",
    "services/replayer/concern.py",
    "services/replayer/figures.py",
    "services/replayer/files.py",
    "services/replayer/life.py",
    "services/replayer/recording.py",
    "services/replayer/redact.py",
    "services/replayer/requests.py",
    "services/replayer/timeline.py",
    "services/replayer/trace.py",
    "services/replayer/whatif.py",
    "services/replayer/work.py",
    "services/scheduler/batching.py",
    "services/scheduler/dispatch.py",
    "services/scheduler/fleet.py",
    "services/scheduler/gate.py",
    "services/scheduler/load.py",
    "services/scheduler/pacing.py",
    "services/scheduler/placement.py",
    "services/scheduler/policies.py",
    "services/scheduler/pool.py",
    "services/scheduler/tally.py",
    "services/scheduler/waiting.py",
    "services/verifier/acceptance.py",
    "services/verifier/emulation.py",
    "services/verifier/replies.py",
    "services/verifier/worth.py",
    "shared/access.py",
    "shared/cost.py",
    "shared/fit.py",
    "shared/hidden.py",
    "shared/messages.py",
    "shared/seal.py",
    "shared/slo.py",
    "shared/topology.py",
]
TALKING = {"aio_pika", "redis", "asyncio", "time", "os", "socket", "fastapi", "structlog", "shared.broker"}


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
        if name.startswith(("services/bench/", "services/cli/", "services/replayer/", "services/training/")):
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
