"""Timing of arms in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from services.tools.bench.engine.arms import ArmFailed, ArmProcess, ArmSizes, EngineArm
from services.tools.bench.engine.core.cases import EngineCase
from services.tools.bench.engine.core.results import EngineTimes, threads_of
from services.tools.local.folder import RunFolder
from services.tools.local.progress import Progress


@contextmanager
def started(
    arms: Sequence[EngineArm], sizes: ArmSizes, progress: Progress, notes: list[str], *, measure_memory: bool = False
) -> Iterator[list[ArmProcess]]:
    """Load all arms, one after the other. One that cannot be loaded is left out, and `notes` gets the reason."""
    with RunFolder("bench-engine") as folder, ExitStack() as stack:
        processes = []
        with progress.step(f"loading {len(arms)} arms, {threads_of(sizes.threads)}") as step:
            for number, arm in enumerate(arms):
                step.detail(f"{arm.name} ({number + 1} of {len(arms)})")
                log = folder.path / f"{number}.log"
                try:
                    process = ArmProcess(arm, sizes, log, measure_memory=measure_memory)
                except ArmFailed as error:
                    notes.append(f"not measured: {error}")
                else:
                    processes.append(stack.enter_context(process))
            step.done(f"{len(processes)} arms loaded, {threads_of(sizes.threads)}")
        yield processes


def measure(
    processes: Sequence[ArmProcess], sizes: ArmSizes, wanted: Sequence[EngineCase], repetitions: int, progress: Progress
) -> EngineTimes:
    """Time all cases. Arms alternate within each case, in another order in each repetition."""
    times = EngineTimes(sizes.threads, sizes.cached, list(wanted), [process.arm.name for process in processes])
    with progress.step(f"measuring, {threads_of(sizes.threads)}") as step:
        for repetition in range(repetitions):
            for case in wanted:
                for process in _rotated(processes, repetition):
                    step.detail(f"repetition {repetition + 1} of {repetitions}: {process.arm.name}, {case.operation}")
                    times.add(process.arm.name, case, process.visit(case))
        step.done(f"{len(processes)} arms measured, {threads_of(sizes.threads)}")
    return times


def _rotated(processes: Sequence[ArmProcess], by: int) -> list[ArmProcess]:
    by %= max(1, len(processes))
    return [*processes[by:], *processes[:by]]
