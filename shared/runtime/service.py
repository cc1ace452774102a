"""The frame of every service process: settings, traces, logs, metrics, signals, tasks and exit code."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import uvloop

from shared.errors import SettingsError, WispError
from shared.runtime import health, logging, tracing
from shared.runtime.settings import ProcessSettings, variables
from shared.runtime.settings_loading import load, misspelt, refuse

S = TypeVar("S", bound=ProcessSettings)
CANCEL_AGAIN_S = 2.0


def run(service: str, kind: type[S], serve: Callable[[S, str, asyncio.Event], Awaitable[None]]) -> None:
    """Run `serve(settings, instance, stop)` until it returns; SIGTERM and SIGINT set `stop`.

    Until `serve` waits for `stop`, it is starting, and the signal cancels it: it may be waiting for RabbitMQ.
    Exits with 2 for invalid settings, and with 1 for an error that the operator has to see. Variables that look like
    misspelt settings are logged.
    """
    program = f"python -m services.{service}"
    settings = load(kind, program)
    instance = settings.instance_name(service)
    try:
        tracing.configure(service, instance, getattr(settings, "namespace", ""))
    except SettingsError as error:
        refuse(program, [f"  {error}"])
    logging.configure(service, instance, settings.log_level, settings.log_format)
    log = logging.get()
    # Not refused: an environment that several programs share may hold variables of others.
    for name, near in misspelt(kind.environment, variables(kind)).items():
        log.warning("a variable is no setting of this service and is ignored", variable=name, meant=near)

    async def main() -> None:
        stop = _Stop()
        loop = asyncio.get_running_loop()

        def end() -> None:
            if not (stop.is_set() or stop.waited_for):
                serving.cancel()
            health.HEALTH.stopping = True
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        if settings.metrics_port:
            health.serve(health.HEALTH, settings.metrics_host, settings.metrics_port, loop)
        serving = asyncio.ensure_future(serve(settings, instance, stop))
        try:
            await serving
        except asyncio.CancelledError:
            if not stop.is_set():
                raise

    try:
        uvloop.run(main())
    except WispError as error:
        log.error("stopped", error=str(error))
        raise SystemExit(1) from None
    except Exception:
        log.exception("crashed")
        raise SystemExit(1) from None
    finally:
        tracing.close()
    log.info("stopped")


class _Stop(asyncio.Event):
    """The event of a service's end."""

    waited_for = False
    """True once the service can end in order."""

    async def wait(self) -> Literal[True]:
        self.waited_for = True
        return await super().wait()


@asynccontextmanager
async def running(stop: asyncio.Event, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run endless loops; enter the body when `stop` is set, and cancel the loops after it.

    A loop that ends has failed: its exception is raised here, so that the process exits and is restarted.
    """
    # Exclude everything loaded so far from garbage collection: scanning it takes tens of milliseconds with torch.
    gc.collect()
    gc.freeze()
    tasks = [asyncio.create_task(loop) for loop in loops]
    stopped: asyncio.Task[Any] = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        yield
    finally:
        await cancel([*tasks, stopped], CANCEL_AGAIN_S)
        await asyncio.gather(*tasks, stopped, return_exceptions=True)


class BackgroundTasks:
    """Work that runs on beside what started it, and outlives it: a request's own task may be cancelled."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start work. Its error is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def ended(self, timeout_s: float) -> None:
        """Wait until all of the work has ended, at most `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logging.get().error("background work failed", error=repr(error), exc_info=error)


async def cancel(tasks: Iterable[asyncio.Future[Any]], again_s: float) -> None:
    """Cancel tasks, and again every `again_s` seconds, until each has ended.

    Before Python 3.12, `asyncio.wait_for` can lose a cancellation that arrives when its awaitable ends, as happens with
    each published message. A task cancelled once would then run for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again_s)
