"""Threads that do one job together, phase by phase (`shared.kernels.team`)."""

# numba's annotations cover neither its intrinsics nor the types in compiled code.
# mypy: disable-error-code="no-untyped-call, call-arg"

from __future__ import annotations

from typing import Final

from shared.kernels.layout import JobWord
from shared.kernels.source.vectors import call_counter, count_up, current, get_word, give_way, kernel

SPINS: Final = 4000
"""Turns that a waiting thread spins before it lets others run: some microseconds, as a phase's threads end together."""

_SEATS, _ARRIVALS, _COUNTERS, _TEAM_SIZE = (
    int(word) for word in (JobWord.SEATS, JobWord.ARRIVALS, JobWord.COUNTERS, JobWord.TEAM_SIZE)
)


@kernel
def team_size(job: int) -> int:
    """Return the number of threads that work on the job, which may be fewer than were asked for."""
    function = get_word(job, _TEAM_SIZE)
    return call_counter(function) if function else 1


@kernel
def take_seat(job: int) -> int:
    """Return this thread's number, from 0."""
    return count_up(job + 8 * _SEATS)


@kernel
def draw(job: int, phase: int) -> int:
    """Return the next ticket of a phase."""
    return count_up(get_word(job, _COUNTERS) + 8 * phase)


@kernel
def finish(job: int, phase: int, team: int) -> int:
    """Wait until all threads have come to the end of this phase; return the next one."""
    if team > 1:
        count_up(job + 8 * _ARRIVALS)
        spins = 0
        while current(job + 8 * _ARRIVALS) < (phase + 1) * team:
            spins += 1
            if spins > SPINS:
                give_way()
    return phase + 1
