"""The target's engine, and the thread in which it lives. Loads torch only with a model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from shared.models.folder import ModelFolder
from shared.twin.layout import is_twin

if TYPE_CHECKING:
    from shared.engine import Engine
    from shared.engine.engine import Output
    from shared.twin.engine import TwinEngine, TwinOutput

    TargetEngine: TypeAlias = Engine | TwinEngine
    TargetOutput: TypeAlias = Output | TwinOutput

T = TypeVar("T")


class EngineSettings(Protocol):
    """The settings of an engine that computes a model."""

    @property
    def dtype(self) -> str:
        """Format of the weights."""

    @property
    def device(self) -> str:
        """torch device."""

    @property
    def threads(self) -> int:
        """CPU threads."""

    @property
    def cache_tokens(self) -> int | None:
        """KV budget; None for what a GPU's memory leaves."""

    @property
    def gpu_memory(self) -> float:
        """Share of a GPU's memory."""

    @property
    def gpus(self) -> int:
        """GPUs that compute the model together."""


def load_engine(target: Path, settings: EngineSettings, *, keep_hidden: bool) -> TargetEngine:
    """Load the model in a folder, or its twin. Raises ModelError, EngineError and SettingsError."""
    engine_class = _engine_class(target)
    if engine_class is None:
        from shared.twin.engine import TwinEngine

        return TwinEngine(target)
    return engine_class(
        target,
        dtype=ModelFolder(target).resolved(settings.dtype),
        device=settings.device,
        threads=settings.threads,
        budget_tokens=settings.cache_tokens,
        keep_hidden=keep_hidden,
        gpu_memory=settings.gpu_memory,
        gpus=settings.gpus,
    )


def _engine_class(target: Path) -> type[Engine] | None:
    """Return the class of the engine that computes a model for this target; None for a twin that waits instead."""
    if not is_twin(target):
        from shared.engine import Engine as ModelEngine

        return ModelEngine
    from shared.twin.folder import TwinFolder

    if TwinFolder.open(target).spec.computed is None:
        return None
    from shared.twin.computed import ComputedTwinEngine

    return ComputedTwinEngine


class EngineThread:
    """An engine and its only thread. Reading the engine's sizes is allowed anywhere, everything else only here."""

    def __init__(self, engine: TargetEngine, executor: ThreadPoolExecutor) -> None:
        """executor: has one worker, the thread in which `engine` was made."""
        self.engine = engine
        self._executor = executor
        self._between: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        """Work for the time between two steps: it waits for the step in progress, but goes before the next one."""

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread before the next step, after the work of earlier calls; return its result."""
        done: Future[T] = Future()
        self._between.append((done, work))
        self._executor.submit(self._run_between)
        return await asyncio.wrap_future(done)

    def step(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run a step in the thread, after the steps that were passed before."""
        return asyncio.get_running_loop().run_in_executor(self._executor, self._run_step, work)

    def _run_step(self, work: Callable[[], T]) -> T:
        self._run_between()
        return work()

    def _run_between(self) -> None:
        while self._between:
            done, work = self._between.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
