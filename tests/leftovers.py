"""The processes that still run."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil


def descendants(pid: int) -> list[psutil.Process]:
    """Children, and theirs."""
    return psutil.Process(pid).children(recursive=True)


def running(process: psutil.Process) -> bool:
    """True if it has not ended; one that only waits to be reaped has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leftovers(processes: Iterable[psutil.Process], within_s: float = 30.0) -> list[psutil.Process]:
    """Those that have not ended `within_s` from now."""
    deadline = time.monotonic() + within_s
    left = [process for process in processes if running(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if running(process)]
    return left
