"""How a benchmark tells its results: a table on the terminal, and the same as JSON under `.wisp/results`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from services.tools.local.folder import state_folder


def machine() -> dict[str, Any]:
    """Facts about the machine that a reader of figures needs: processor, cores, memory in GB, system, load before the
    run."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": round(psutil.getloadavg()[0], 2),
    }


def report(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Print a table with its notes, write everything to `<folder>/<name>.json`, return that path.

    columns: names with their unit (`decode ms`); rows: one value per column, numbers unrounded (printed with 3 digits).
    facts: what was measured on what, beside `machine()`. folder: `.wisp/results` unless given.
    """
    known = {**machine(), **(facts or {})}
    console = terminal()
    console.print(table(title, columns, rows))
    console.print(", ".join(f"{key} {value}" for key, value in known.items()), style="dim", highlight=False)
    for note in notes:
        console.print(note, highlight=False)
    path = keep(
        name,
        {
            "title": title,
            "facts": known,
            "rows": [dict(zip(columns, row, strict=True)) for row in rows],
            "notes": list(notes),
        },
        folder,
    )
    console.print(f"written to {path}", style="dim", highlight=False)
    return path


def terminal() -> Console:
    """Where tables are printed: as wide as the terminal, or wide enough for a file."""
    return Console(width=None if Console().is_terminal else 120)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table, numbers to the right; None shows as nothing."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float | None) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", no_wrap=not numeric)
    for row in rows:
        made.add_row(*(_shown(value) for value in row))
    return made


def keep(name: str, record: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a benchmark's record to `<folder>/<name>.json`, with its name and the time; returns that path."""
    path = (folder or state_folder() / "results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = {"name": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **record}
    path.write_text(json.dumps(stamped, indent=1) + "\n")
    return path


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
