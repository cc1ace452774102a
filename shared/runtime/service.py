"""What every service process does around its own work: settings, logs, metrics, signals, exit code."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvloop

from shared.errors import WispError
from shared.runtime import health, logging
from shared.runtime.settings import ProcessSettings, load
from shared.runtime.tasks import cancel

S = TypeVar("S", bound=ProcessSettings)
CANCEL_AGAIN_S = 2.0


def run(service: str, kind: type[S], serve: Callable[[S, str, asyncio.Event], Awaitable[None]]) -> None:
    """Run `serve(settings, instance, stop)` until it returns; SIGTERM and SIGINT set `stop`.

    Ends the process with status 2 for bad settings and 1 for an error that the operator has to see.
    """
    settings = load(kind, f"python -m services.{service}")
    instance = settings.instance_name(service)
    logging.configure(service, instance, settings.log_level, settings.log_format)
    log = logging.get()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> None:
            health.HEALTH.stopping = True
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        if settings.metrics_port:
            health.serve(health.HEALTH, settings.metrics_host, settings.metrics_port, loop)
        await serve(settings, instance, stop)

    try:
        uvloop.run(main())
    except WispError as error:
        log.error("stopped", error=str(error))
        raise SystemExit(1) from None
    except Exception:
        log.exception("crashed")
        raise SystemExit(1) from None
    log.info("stopped")


@asynccontextmanager
async def running(stop: asyncio.Event, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run endless loops; the body is entered when `stop` is set, and the loops are cancelled after it.

    A loop that ends has failed: its exception is raised instead, so that the process ends and is started again.
    """
    # What was loaded stays: the collector need not walk it again, which takes tens of milliseconds beside torch.
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
