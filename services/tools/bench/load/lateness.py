"""The lateness of emulated times while a point is measured, from the logs of a stack's services."""

from __future__ import annotations

import json
from pathlib import Path

from shared.twin.lateness import EVENT


class EmulationLog:
    """Adds up the emulated and the late time of all processes of a stack."""

    def __init__(self, folder: Path) -> None:
        """folder: with the processes' logs."""
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._totals: dict[Path, tuple[float, float]] = {}
        self._taken = (0.0, 0.0)

    def take(self) -> float | None:
        """Return the share of late time in the emulated time since the last call; None if nothing was emulated."""
        for log in self._folder.glob("*.log"):
            self._follow(log)
        emulated_ms, late_ms = (sum(total[i] for total in self._totals.values()) for i in (0, 1))
        before, self._taken = self._taken, (emulated_ms, late_ms)
        if emulated_ms <= before[0]:
            return None
        return (late_ms - before[1]) / (emulated_ms - before[0])

    def _follow(self, log: Path) -> None:
        """Read what has been written to a log since the last time."""
        with log.open("rb") as file:
            file.seek(self._read.get(log, 0))
            data = file.read()
        whole = data.rpartition(b"\n")[0]
        self._read[log] = self._read.get(log, 0) + len(whole) + bool(whole)
        for line in whole.splitlines():
            if EVENT.encode() not in line:
                continue
            try:
                fields = json.loads(line)
                self._totals[log] = float(fields["emulated_ms"]), float(fields["late_ms"])
            except (ValueError, KeyError, TypeError):
                continue  # another event with these words
