"""Threads that do one job together, phase by phase.

A job is an array of 64-bit words that begins with `JobWord`'s. All threads run the same compiled function on it.
In each phase they draw tickets from the phase's counter until none is left, and wait for each other at its end. The
threads are those of torch's own OpenMP runtime: a second pool would compete with it for the cores.

A process forked after a job has none of its parent's threads, and the runtime would wait for them for ever. So it runs
jobs on one thread, with the same results.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.kernels.layout import JobWord

_forked = False
"""True in a process that was forked from one with this module."""


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def job_words(words: int, phases: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a job of this many words, header included, and the counters of its phases; the caller keeps both."""
    counters = np.zeros(phases, np.int64)
    job = np.zeros(words, np.int64)
    job[JobWord.COUNTERS] = counters.ctypes.data
    return job, counters


def run(function: Callable[[int], None], job: NDArray[np.int64], counters: NDArray[np.int64], threads: int) -> None:
    """Run a job with at most this many threads. The GIL is released."""
    counters[:] = 0
    job[JobWord.SEATS] = job[JobWord.ARRIVALS] = 0
    openmp = _openmp() if threads > 1 and not _forked else None
    if openmp is None:
        job[JobWord.TEAM_SIZE] = 0
        function(job.ctypes.data)
    else:
        region, team = openmp
        job[JobWord.TEAM_SIZE] = team
        region(ctypes.cast(function, ctypes.c_void_p), job.ctypes.data, threads, 0)  # type: ignore[arg-type]


@cache
def _openmp() -> tuple[Callable[[Any, int, int, int], None], int] | None:
    """Return `GOMP_parallel(function, argument, threads, flags)` of the process's OpenMP runtime, and the address of
    `omp_get_num_threads`; None without GNU's OpenMP, as in torch's builds for macOS."""
    torch = sys.modules.get("torch")
    if torch is None or torch.__file__ is None:
        return None
    try:
        library = ctypes.CDLL(torch.__file__.replace("__init__.py", "lib/libtorch_cpu.so"))
        region, team = library.GOMP_parallel, library.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    region.restype = None
    address = ctypes.cast(team, ctypes.c_void_p).value
    return (region, address) if address else None
