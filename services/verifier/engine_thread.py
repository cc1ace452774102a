"""The thread in which the engine lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shared.engine import Engine

T = TypeVar("T")


class EngineThread:
    """An engine and its only thread. Reading the engine's sizes is allowed anywhere, everything else only here."""

    def __init__(self, engine: Engine, executor: ThreadPoolExecutor) -> None:
        """executor: has one worker, the thread in which `engine` was made."""
        self.engine = engine
        self._executor = executor

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread, after everything that was passed before; return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
