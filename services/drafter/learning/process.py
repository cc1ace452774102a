"""The process that learns: at the lowest priority, and apart from its start only while its drafter has no sessions."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from services.drafter.core.observed import ObservedText
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.learning.reports import LearningOptions, LearningReport
from services.drafter.learning.versions import VersionFolder
from shared.errors import SettingsError, WispError
from shared.models.folder import ModelFolder

if TYPE_CHECKING:
    from services.drafter.learning.learner import DraftLearner

MOST_ARRIVED = 256
"""Most texts that wait for the drafter to be idle; older ones are dropped."""
PAUSE_S = 0.1
"""Time after which a pausing process checks whether it may go on."""


class IdleFlag(Protocol):
    """A flag in shared memory: true while the drafter has no sessions."""

    value: bool


@dataclass(frozen=True)
class LearningPlan:
    """The draft and the target of a learning process, and its options."""

    draft: Path
    target: Path
    target_fingerprint: str
    """Of the target whose hidden states the texts have."""
    options: LearningOptions
    folder: Path | None
    """Folder for learned versions; None keeps none."""


@dataclass(frozen=True)
class LearningProblem:
    """A problem that the drafter's log should show."""

    message: str


@dataclass(frozen=True)
class LearningUse:
    """A comparison, and the CPU time since the last one."""

    report: LearningReport
    cpu_s: float


def run_learning(connection: Connection, idle: IdleFlag, plan: LearningPlan) -> None:
    """Run a learning process until its drafter ends."""
    if plan.options.yields:
        _yield_to_all_others()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            begun = _begin(connection, plan)
        except WispError as error:
            connection.send(LearningProblem(f"learning cannot begin: {error}"))
            return
        learn(connection, idle, *begun)


def learn(
    connection: Connection, idle: IdleFlag, learner: DraftLearner, keep: Callable[[LearningReport], None]
) -> None:
    """Learn from the texts that arrive, and send reports, until the connection ends, which raises EOFError.

    keep: keeps a report's weights over restarts.
    """
    cpu_s = time.process_time()
    arrived: deque[ObservedText] = deque(maxlen=MOST_ARRIVED)
    while True:
        while connection.poll(0 if idle.value and (arrived or learner.has_work) else PAUSE_S):
            arrived.append(connection.recv())
        if not idle.value:
            continue
        if arrived:
            learner.add(arrived.popleft())
        elif learner.has_work and (report := learner.work()) is not None:
            keep(report)
            now_s = time.process_time()
            connection.send(LearningUse(report, now_s - cpu_s))
            cpu_s = now_s


def _yield_to_all_others() -> None:
    """Take CPU time only where no other process wants it, and leave signals of the terminal to the drafter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # sandboxes may refuse it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.environ["OMP_WAIT_POLICY"] = "passive"


def _begin(connection: Connection, plan: LearningPlan) -> tuple[DraftLearner, Callable[[LearningReport], None]]:
    """Return the learner, with the newest kept weights, and the function that keeps a report's weights."""
    import torch

    from services.drafter.hidden import weights
    from services.drafter.learning.learner import DraftLearner

    torch.set_num_threads(1)
    draft, target = HiddenDraftFolder.open(plan.draft), ModelFolder(plan.target)
    if plan.folder is None:
        return DraftLearner(draft, target, plan.options), lambda report: None
    versions = VersionFolder(plan.folder, draft, plan.target_fingerprint)
    try:
        if not versions.lock():
            connection.send(LearningProblem(f"another process keeps learned drafts in {versions.path}; keeping none"))
    except SettingsError as error:
        connection.send(LearningProblem(str(error)))
    learner = DraftLearner(draft, target, plan.options, versions.last_number, versions.newest())

    def keep(report: LearningReport) -> None:
        if report.weights is None or not versions.locked:
            return
        facts = {
            "version": report.version,
            "outcome": report.outcome,
            "acceptance": report.acceptance,
            "shipped_acceptance": report.shipped_acceptance,
            "target_fingerprint": plan.target_fingerprint,
        }
        try:
            versions.keep(
                report.version, lambda path: weights.save(path, learner.current(), learner.head_ids, target), facts
            )
        except OSError as error:
            connection.send(LearningProblem(f"a learned draft could not be kept in {versions.path}: {error}"))

    return learner, keep
