"""Learning beside a drafter: hands its sessions' texts to a process that learns, and takes new weights from it."""

from __future__ import annotations

import importlib.util
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from services.drafter import metrics
from services.drafter.core.observed import ObservedSession, StateRecorder
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.tensors import draft_tensors
from services.drafter.learning.process import LearningPlan, LearningProblem, LearningUse, run_learning
from services.drafter.learning.reports import DraftWeights, LearningOptions, LearningReport
from services.drafter.learning.versions import VersionFolder
from shared.errors import ModelError, SettingsError, WispError
from shared.messages import Generate, LearningState
from shared.runtime import logging

PENDING = 64
"""Sessions whose texts wait for the learning process; further ones are not learned from."""
RECORDED = 512
"""Most tokens of a session that are learned from: its last ones."""
JOIN_S = 5.0


@dataclass(frozen=True)
class LearningSetup:
    """The draft that learns, and where."""

    draft: HiddenDraftFolder
    target: Path
    hidden_size: int
    options: LearningOptions
    folder: Path | None
    """Folder for learned versions; None keeps none."""

    def check(self) -> None:
        """Raise ModelError or SettingsError if learning cannot work here."""
        if importlib.util.find_spec("torch") is None:
            raise ModelError(
                "a draft learns with torch, which is not installed: pip install 'wisp[model]', or set "
                "WISP_DRAFT_LEARNING=false"
            )
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(
                    f"WISP_DRAFT_LEARNING_FOLDER: {self.folder} cannot be created: {error.strerror}"
                ) from error


class DraftLearning:
    """A draft that learns from the sessions of its drafter.

    The learning process starts with the first text. Apart from its start it computes only while no session is served.
    Its weights are bound to the target of the first session; sessions of another target are not learned from.
    """

    def __init__(self, setup: LearningSetup, replace: Callable[[DraftWeights], None]) -> None:
        """replace: takes new weights into use; called in a thread of its own."""
        self._setup = setup
        self._replace = replace
        self._log = logging.get()
        self._fingerprint: str | None = None
        self._failed = False
        """True if its process has ended before the drafter. Nothing is learned from then on."""
        self._stopping = False
        context = multiprocessing.get_context("spawn")
        self._context = context
        self._idle = context.RawValue("b", True)
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(PENDING)
        self._connection: Connection | None = None
        self._process: Any = None
        self.state: LearningState | None = None
        """The last comparison; None before the first one."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Learn within the body."""
        thread = threading.Thread(target=self._run, name="learning", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop(thread)

    def recorder(self, generate: Generate) -> StateRecorder | None:
        """Return the recorder for a new session's hidden states; None if it is not to be learned from."""
        if self._fingerprint is None:
            self._fingerprint = generate.fingerprint
            self._put(self._load_kept)
        if generate.fingerprint != self._fingerprint or self._failed:
            return None
        return StateRecorder(self._setup.hidden_size, RECORDED)

    def serving(self, sessions: int) -> None:
        """Note the number of sessions being served; the process computes only while there are none."""
        self._idle.value = sessions == 0

    def observe(self, session: ObservedSession) -> None:
        """Learn from a session that has ended."""
        self._put(lambda: self._send(session))

    def _put(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            self._work.put_nowait(work)
        except queue.Full:
            metrics.LEARNING_DROPPED.inc()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._failed:
                continue
            try:
                work()
            except WispError as error:
                self._log.warning("draft learning", error=str(error))
            except (BrokenPipeError, ConnectionResetError):
                self._fail()
            except Exception:
                self._log.exception("draft learning failed")

    def _fail(self) -> None:
        """Learn no more: the process has ended."""
        if not (self._failed or self._stopping):
            self._log.warning("the learning process has ended; the draft stays as it is")
        self._failed = True

    def _stop(self, thread: threading.Thread) -> None:
        self._stopping = True
        process, connection = self._process, self._connection
        if process is not None and connection is not None:
            # A thread that sends to it goes on. The next process removes a version that this one was writing.
            process.kill()
            process.join(JOIN_S)
            connection.close()
        while thread.is_alive():
            try:
                self._work.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        thread.join(JOIN_S)

    def _load_kept(self) -> None:
        """Take the newest kept weights into use."""
        if self._setup.folder is None or self._fingerprint is None:
            return
        versions = VersionFolder(self._setup.folder, self._setup.draft, self._fingerprint)
        if (kept := versions.newest()) is not None:
            self._replace(draft_tensors(kept))
            metrics.LEARNED_VERSION.set(versions.number(kept))
            self._log.info("learned draft in use", folder=str(kept.path))

    def _send(self, session: ObservedSession) -> None:
        texts = session.texts()
        if not texts:
            return
        connection = self._connection or self._start()
        for text in texts:
            metrics.LEARNING_TOKENS.inc(text.answer_tokens)
            connection.send(text)

    def _start(self) -> Connection:
        """Start the learning process, and a thread that takes its reports."""
        setup = self._setup
        assert self._fingerprint is not None
        plan = LearningPlan(setup.draft.path, setup.target, self._fingerprint, setup.options, setup.folder)
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=run_learning, args=(theirs, self._idle, plan), name="learning", daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection = ours
        threading.Thread(target=self._receive, args=(ours,), name="learned", daemon=True).start()
        return ours

    def _receive(self, connection: Connection) -> None:
        while True:
            try:
                received: LearningUse | LearningProblem = connection.recv()
            except (EOFError, OSError):
                self._fail()
                return
            if isinstance(received, LearningProblem):
                self._log.warning("draft learning", error=received.message)
                continue
            try:
                self._apply(received.report, received.cpu_s)
            except WispError as error:
                self._log.warning("draft learning", error=str(error))
            except Exception:
                self._log.exception("draft learning failed")

    def _apply(self, report: LearningReport, cpu_s: float) -> None:
        self.state = LearningState(
            version=report.version, acceptance=report.acceptance, shipped_acceptance=report.shipped_acceptance
        )
        metrics.count_learning(report, cpu_s)
        self._log.info(
            "draft learning",
            outcome=report.outcome,
            version=report.version,
            acceptance=round(report.acceptance, 4),
            shipped_acceptance=round(report.shipped_acceptance, 4),
            updates=report.updates,
            learned=report.learned,
        )
        if report.weights is not None:
            self._replace(report.weights)
