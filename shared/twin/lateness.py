"""Lateness of emulated times: how much longer waits take than they should, in the log of each process.

`wisp bench` adds the processes' figures up and marks a run whose emulation could not keep up.
"""

from __future__ import annotations

import time
from threading import Lock

from shared.runtime import logging

EVENT = "emulated time"
"""Log event with the totals of a process so far: `emulated_ms` and `late_ms`."""
LOG_S = 0.5
TIMER_MS = 0.1
"""Time by which `time.sleep` is late on an idle machine."""


class Lateness:
    """The emulated time of a process, and by how much its waits ended too late."""

    def __init__(self) -> None:
        self.emulated_ms = 0.0
        self.late_ms = 0.0
        self._logged_s = float("-inf")
        self._lock = Lock()

    def add(self, emulated_ms: float, late_ms: float) -> None:
        """Add a wait. late_ms: negative if it ended too early, as timers do by fractions of a millisecond."""
        with self._lock:
            self.emulated_ms += emulated_ms
            self.late_ms += late_ms
            now_s = time.monotonic()
            if now_s - self._logged_s < LOG_S:
                return
            self._logged_s = now_s
            logging.get().info(EVENT, emulated_ms=round(self.emulated_ms, 1), late_ms=round(self.late_ms, 1))


LATENESS = Lateness()
"""Of this process."""


def wait_for_step(started_s: float, took_ms: float) -> None:
    """Wait until a step that began at a time (of `time.perf_counter`) has taken this long, and note the lateness."""
    end_s = started_s + took_ms / 1000
    time.sleep(max(0.0, end_s - time.perf_counter() - TIMER_MS / 1000))
    LATENESS.add(took_ms, (time.perf_counter() - end_s) * 1000)
