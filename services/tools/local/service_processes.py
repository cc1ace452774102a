"""Processes of a stack's services: started, ready, watched until one ends by itself, and stopped."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from services.tools.local import logs
from services.tools.local.folder import checkout
from services.tools.local.process import Process
from services.tools.local.service_commands import API_SERVICES, SERVICES, ServiceCommands
from shared.errors import WispError

START_S = 600.0
"""Longest wait for a process; one that dies ends it at once. Two busy cores took over three minutes for all models."""
STOP_GRACE_S = 25.0
POLL_S = 0.05
READY_EVENTS = frozenset({"ready", "serving"})

T = TypeVar("T")


class ServiceFailed(WispError):
    """A process of the stack ended by itself, or was not ready in time."""


class ServiceProcesses:
    """The processes of one run. Set `folder` and `commands` before the first one is launched."""

    folder: Path
    """Folder of the logs."""
    commands: ServiceCommands

    def __init__(self, env_of: Mapping[str, Mapping[str, str]]) -> None:
        """env_of: variables by service."""
        self._env_of = env_of
        self.launched: list[tuple[str, Process]] = []
        """Every process with its service, in the order of their start."""
        self.urls: dict[int, str] = {}
        """Base URLs of the processes that have been ready, by pid."""
        self._started: Counter[str] = Counter()
        self._stopped: set[int] = set()
        self._failed: asyncio.Future[None] | None = None
        self._watchers: set[asyncio.Task[None]] = set()

    def running(self, service: str | None = None) -> list[Process]:
        """Return the running processes of a service, or of all, in the order of their start."""
        return [process for name, process in self.launched if service in (None, name) and process.alive]

    async def start(self, service: str, env: Mapping[str, str], under: Sequence[str] = ()) -> Process:
        """Launch a process, and watch it."""
        process = await self.launch(service, env, under)
        self.observe(process)
        return process

    async def launch(self, service: str, env: Mapping[str, str], under: Sequence[str] = ()) -> Process:
        """Launch a process without watching it. under: a command line that runs the service's command."""
        if service not in SERVICES:
            raise ValueError(f"there is no service {service!r}; the services are {', '.join(SERVICES)}")
        # Count before the first await: several processes may be started concurrently.
        self._started[service] += 1
        name = f"{service}-{self._started[service]}"
        process = await Process.start(
            name,
            [*under, *self.commands.command(service)],
            log=self.folder / f"{name}.log",
            environment=self.commands.environment(service, name, {**self._env_of.get(service, {}), **env}),
            folder=checkout(),
        )
        self.launched.append((service, process))
        return process

    async def until_ready(self, service: str, process: Process, *, answers: bool) -> None:
        """Wait for the process's ready event in its log and, if it has an API that `answers`, for its `/ready`.

        Raises ServiceFailed.
        """
        try:
            async with asyncio.timeout(START_S):
                while not (ready := logs.find(process.log, READY_EVENTS)):
                    if not process.alive:
                        raise ServiceFailed(
                            f"{process.name} ended with status {process.returncode} before it was ready. "
                            f"The end of its log:\n{logs.readable(process.tail(15))}"
                        )
                    await asyncio.sleep(POLL_S)
                if service in API_SERVICES:
                    self.urls[process.pid] = url = str(ready["url"])
                    if answers:
                        await logs.until_answers(url.removesuffix("/v1") + "/ready", POLL_S)
        except TimeoutError:
            raise ServiceFailed(
                f"{process.name} was not ready within {START_S:.0f} s. The end of its log ({process.log}):\n"
                f"{logs.readable(process.tail(15))}"
            ) from None

    async def stop(
        self, process: Process, number: signal.Signals = signal.SIGTERM, grace_s: float = STOP_GRACE_S
    ) -> int:
        """Stop one process with a signal; kill it after `grace_s`. Return its exit status."""
        self._stopped.add(process.pid)
        return await process.stop(number, grace_s)

    async def discard_all(self) -> None:
        """Kill the processes, which are to be started again under the same names."""
        await asyncio.gather(*(process.stop(signal.SIGKILL) for _, process in self.launched))
        for _, process in self.launched:
            process.log.unlink(missing_ok=True)
        self.launched.clear()
        self._started.clear()

    def observe(self, process: Process) -> None:
        """Watch a process: `watch` and `next_failure` raise or return its end, unless `stop` caused it."""
        watcher = asyncio.create_task(self._observed(process))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    def end_watching(self) -> None:
        """Watch no process any more."""
        for watcher in self._watchers:
            watcher.cancel()

    async def _observed(self, process: Process) -> None:
        status = await process.wait()
        failed = self._failure()
        if process.pid not in self._stopped and not failed.done():
            failed.set_exception(
                ServiceFailed(
                    f"{process.name} ended with status {status}. The end of its log ({process.log}):\n"
                    f"{logs.readable(process.tail(15))}"
                )
            )
            failed.exception()  # mark it as retrieved: `watch` or `next_failure` reports it

    def _failure(self) -> asyncio.Future[None]:
        """Return the future of the next failure."""
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        return self._failed

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`; raise ServiceFailed as soon as a watched process ends by itself."""
        failed = self._failure()
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, failed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                failed.result()
            return await task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def next_failure(self) -> ServiceFailed:
        """Wait until a watched process ends by itself; call again for the next one."""
        failed = self._failure()
        await asyncio.wait({failed})
        failure = failed.exception()
        self._failed = None
        assert isinstance(failure, ServiceFailed)
        return failure
