"""Steps of `wisp bench gpu`: each has its own process and time, and keeps what it has found."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from services.tools.bench.gpu import runner
from services.tools.bench.gpu.plan import FORMS, KINDS, MODELS, TINY_PLAN, GpuPlan, GpuStep, steps_of
from services.tools.bench.gpu.runner import StepOutcome, StepRunner
from services.tools.bench.gpu.verdict import verdicts

PROGRAM = """
import glob, json, os, subprocess, sys, time
step, rows = json.loads(sys.argv[2]), sys.argv[3]
def emit(*values):
    with open(rows, "a") as file:
        file.write(json.dumps({"table": "speed", "values": values}) + chr(10))
emit(step["model"], time.time())
if step["model"] == "breaks":
    raise RuntimeError("an illegal address")
if step["model"] == "stands":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    emit(child.pid)
    open(rows, "a").write('{"table": ')
    time.sleep(600)
while step["kind"] == "exactness" and len(glob.glob(os.path.join(os.path.dirname(rows), "exactness-*.jsonl"))) < 2:
    time.sleep(0.01)
time.sleep(step["model"] == "waits" and 1)
emit(step["model"], time.time())
"""


def run(folder: Path, steps: list[GpuStep], total_s: float = 300.0) -> dict[str, StepOutcome]:
    steps_runner = StepRunner(TINY_PLAN, folder, total_s, 2, (sys.executable, "-c", PROGRAM))
    return {outcome.name: outcome for outcome in steps_runner.run(steps)}


def ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_failure_and_a_standstill_end_one_step_and_keep_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST_S", 0.0)
    # On a busy machine it takes longer until the step has its rows and stands still.
    for limit_s in (2.0, 8.0, 32.0):
        stands = GpuStep("speed", "stands", limit_s=limit_s)
        outcomes = run(tmp_path / f"{limit_s}", [GpuStep("speed", "breaks"), stands, GpuStep("speed", "ends")])
        if len(outcomes["speed-stands"].rows) == 2:
            break
    broken, stopped, done = (outcomes[f"speed-{name}"] for name in ("breaks", "stands", "ends"))
    assert (broken.outcome, broken.reason, len(broken.rows)) == ("failed", "RuntimeError: an illegal address", 1)
    assert (stopped.outcome, len(stopped.rows)) == ("out of time", 2)
    assert (done.outcome, len(done.rows)) == ("done", 2)
    (child,) = stopped.rows[1]["values"]
    deadline = time.monotonic() + 60
    while not ended(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_steps_that_measure_times_run_alone(tmp_path: Path) -> None:
    steps = [
        GpuStep("exactness", "waits", form, timed=False) for form in FORMS
    ] + [GpuStep("speed", "waits"), GpuStep("products", "waits")]  # fmt: skip
    outcomes = list(run(tmp_path, steps).values())
    assert [one.outcome for one in outcomes] == ["done"] * 5
    spans = [tuple(row["values"][1] for row in one.rows) for one in outcomes]
    assert spans[1][0] < spans[0][1], "exactness is measured side by side: the first one waits for the second"
    for one, other in ((spans[3], spans[4]), *((span, spans[3]) for span in spans[:3])):
        assert one[1] < other[0]


def test_a_step_for_which_no_time_is_left_is_not_begun(tmp_path: Path) -> None:
    outcomes = run(tmp_path, [GpuStep("speed", "ends")], total_s=1.0)
    assert [(one.outcome, one.rows) for one in outcomes.values()] == [("not begun", [])]


def test_exactness_comes_first_and_calibration_after_speed() -> None:
    plan = GpuPlan(list(MODELS), list(FORMS), ["qwen3-32b"], 8, 8, 250, 20, 64, [1, 32], 512, 2048, 10, 2048, 328)
    steps = steps_of(plan)
    assert list(dict.fromkeys(step.kind for step in steps)) == list(KINDS)
    assert len({step.name for step in steps}) == len(steps)
    untimed = [step for step in steps if not step.timed]
    assert steps[: len(untimed)] == untimed
    assert [step.kind for step in steps_of(plan, ["texts"])] == ["texts"]


@pytest.mark.parametrize("differing", [0, 3])
def test_results_say_what_differs_what_is_missing_and_what_needs_a_gpu(differing: int) -> None:
    rows: dict[str, list[list[object]]] = {
        "exactness": [["tiny", "bfloat16", "decode, alone", 100, differing]],
        "texts": [["target", 20, 900, 0, differing]],
        "speed": [["8b", 32, 512, 1, 10.0, 11.0, 900.0, 81.0], ["8b", 32, 512, 5, 12.0, 13.0, 900.0, 70.0]],
    }
    outcomes = [StepOutcome("speed-8b", "out of time", 60.0, []), StepOutcome("texts", "done", 5.0, [])]
    said = " ".join(verdicts(rows, outcomes, tiny=False))
    assert ("NOT exact" in said) == (differing > 0)
    assert "1.20 times as long as decoding one (aim 1.1)" in said
    assert "81 % of the bandwidth" in said
    assert "Incomplete: speed-8b (out of time)." in said
    assert "Not run for lack of a GPU: bits on a GPU" in " ".join(verdicts(rows, outcomes, tiny=True))
