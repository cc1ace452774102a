"""Runs steps as processes, each within its own time, and keeps what each has found even if it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from services.tools.bench.gpu.plan import GpuPlan, GpuStep

STEP: Final = (sys.executable, "-m", "services.tools.bench.gpu.step")
"""Command of a step, which gets files of plan and rows."""
LEAST_S: Final = 15.0
"""A step with less time than this is not begun."""
POLL_S: Final = 0.1
GRACE_S: Final = 8.0
"""Longest time that a step which is stopped gets to remove its files: a model's weights in memory, for example."""
SHOWN: Final = 300
"""Characters of a failure that the results keep; the log has all."""


@dataclass(frozen=True)
class StepOutcome:
    """A step's end. Rows are those that it had found by then."""

    name: str
    outcome: str
    """`done`, `failed`, `out of time` (stopped at its limit) or `not begun` (no time was left for it)."""
    seconds: float
    rows: list[dict[str, Any]]
    reason: str = ""


@dataclass
class _RunningStep:
    step: GpuStep
    process: subprocess.Popen[bytes]
    began_s: float
    limit_s: float


class StepRunner:
    """Runs the steps of a plan."""

    def __init__(self, plan: GpuPlan, folder: Path, total_s: float, beside: int, command: Sequence[str] = STEP) -> None:
        """folder: for each step's rows and log. total_s: for all steps. beside: most untimed steps at once."""
        self._folder, self._beside, self._command = folder, beside, command
        self._end_s = time.monotonic() + total_s
        folder.mkdir(parents=True, exist_ok=True)
        self._plan = folder / "plan.json"
        self._plan.write_text(json.dumps(asdict(plan)) + "\n")

    def run(self, steps: Sequence[GpuStep]) -> Iterator[StepOutcome]:
        """Run the steps in their order, untimed ones side by side; yield each one's end."""
        waiting, running = list(steps), list[_RunningStep]()
        with _ended(running):
            while waiting or running:
                while waiting and self._may_begin(waiting[0], running):
                    step = waiting.pop(0)
                    limit_s = min(step.limit_s, self._end_s - time.monotonic())
                    if limit_s < LEAST_S:
                        yield StepOutcome(step.name, "not begun", 0.0, [], "no time was left for it")
                        continue
                    running.append(_RunningStep(step, self._begin(step), time.monotonic(), limit_s))
                for one in list(running):
                    if (outcome := self._outcome(one)) is not None:
                        running.remove(one)
                        yield outcome
                time.sleep(POLL_S)

    def _may_begin(self, step: GpuStep, running: Sequence[_RunningStep]) -> bool:
        if step.timed:
            return not running
        return len(running) < self._beside and not any(one.step.timed for one in running)

    def _begin(self, step: GpuStep) -> subprocess.Popen[bytes]:
        rows, log = self._files(step)
        rows.unlink(missing_ok=True)
        command = [*self._command, str(self._plan), json.dumps(asdict(step)), str(rows)]
        with log.open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def _outcome(self, one: _RunningStep) -> StepOutcome | None:
        """Return the end of a step, which it reaches at its limit at the latest; None if it goes on."""
        status = one.process.poll()
        seconds = time.monotonic() - one.began_s
        if status is None and seconds < one.limit_s:
            return None
        outcome = "out of time" if status is None else "failed" if status else "done"
        _end(one.process)
        rows, log = self._files(one.step)
        reason = {"done": "", "out of time": f"stopped after {one.limit_s:.0f} s"}.get(outcome, _last_line(log))
        return StepOutcome(one.step.name, outcome, round(seconds, 1), _read_rows(rows), reason)

    def _files(self, step: GpuStep) -> tuple[Path, Path]:
        return self._folder / f"{step.name}.jsonl", self._folder / f"{step.name}.log"


class RowWriter:
    """Writes a step's rows, each at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, table: str, values: Sequence[Any]) -> None:
        """Append a row of a table."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, "values": list(values)}) + "\n")


Emit = Callable[[str, Sequence[Any]], None]
"""Takes a table's name and a row's values."""


@contextmanager
def _ended(running: Sequence[_RunningStep]) -> Iterator[None]:
    """End what still runs when the body does."""
    try:
        yield
    finally:
        for one in running:
            _end(one.process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step's process and those that it has started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a file; a step that was stopped may have begun another one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-SHOWN:] if lines else "it ended without a word"
