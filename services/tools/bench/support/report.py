"""Results of a benchmark: tables and facts on the terminal, and the same as JSON under `.wisp/results`."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from services.tools.cli.terminal import SafeConsole
from services.tools.local.folder import state_folder

CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Return the facts about this machine that every figure has to name.

    `instructions` are those that the speed of a model depends on most (`instruction_set`); `memory_gb` is in GB;
    `load_average` is the load of the last minute, from before the run.
    """
    cpu_info = _cpu_info()
    return {
        "processor": _processor(cpu_info),
        "instructions": _instructions(cpu_info),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": round(psutil.getloadavg()[0], 2),
    }


def cpu_kind() -> str:
    """Name the kind of CPU for a table's title: "AMD EPYC (family 25, model 1), AVX2 only"."""
    cpu_info = _cpu_info()
    return f"{_processor(cpu_info)}, {_instructions(cpu_info)}"


def instruction_set(flags: Collection[str]) -> str:
    """Name the widest vector instructions among a CPU's flags, and whether it computes bfloat16 in hardware."""
    if "avx512f" in flags:
        bfloat16 = "amx_bf16" in flags or "avx512_bf16" in flags
        return f"AVX-512 {'with' if bfloat16 else 'without'} bfloat16"
    if "avx2" in flags:
        return "AVX2 only"
    if "asimd" in flags:
        return f"NEON {'with' if 'bf16' in flags else 'without'} bfloat16"
    return "unknown"


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
    """Print a table with its facts and notes, write all of it to `<folder>/<name>.json`, and return that path.

    columns: names with their unit (`decode ms`); rows: one value per column, numbers unrounded (printed with 3 digits).
    facts: what was measured, in addition to `machine()`. folder: `.wisp/results` by default.
    """
    console = terminal()
    console.print(table(title, columns, rows))
    record = {
        "title": title,
        "facts": {**machine(), **(facts or {})},
        "rows": records(columns, rows),
        "notes": list(notes),
    }
    return conclude(console, name, record, folder)


def conclude(console: Console, name: str, record: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Print the `facts` and `notes` of a record, write it to `<folder>/<name>.json`, and return that path."""
    facts = ", ".join(f"{key} {value}" for key, value in record["facts"].items())
    console.print(facts, style="dim", highlight=False)
    for note in record.get("notes", ()):
        console.print(note, highlight=False, soft_wrap=True)
    path = write_record(name, record, folder)
    written(console, path)
    return path


def write_record(name: str, record: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a record with its name and the time to `<folder>/<name>.json`; return that path."""
    path = (folder or state_folder() / "results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = {"name": name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **record}
    path.write_text(json.dumps(stamped, indent=1) + "\n")
    return path


def written(console: Console, *paths: Path) -> None:
    """Print where the result files are."""
    console.print(f"written to {', '.join(str(path) for path in paths)}", style="dim", highlight=False)


def terminal() -> Console:
    """Return the console for tables: as wide as the terminal, or 120 columns in a file."""
    return SafeConsole(width=None if Console().is_terminal else 120)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table with numbers aligned to the right. None is shown as an empty cell."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float | None) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", no_wrap=not numeric)
    for row in rows:
        made.add_row(*(_shown(value) for value in row))
    return made


def records(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table as one object each, for a result file."""
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _cpu_info() -> str:
    return CPU_INFO.read_text() if CPU_INFO.is_file() else ""


def _processor(cpu_info: str) -> str:
    """Return the processor's name. Virtual machines hide the exact one; family and model tell its generation."""
    name = _field(cpu_info, "model name") or platform.processor() or platform.machine()
    family, model = _field(cpu_info, "cpu family"), _field(cpu_info, "model")
    return f"{name} (family {family}, model {model})" if family and model else name


def _instructions(cpu_info: str) -> str:
    return instruction_set((_field(cpu_info, "flags") or _field(cpu_info, "Features")).split())


def _field(cpu_info: str, name: str) -> str:
    """Return a field of the first processor in `/proc/cpuinfo`; empty where it is missing."""
    for line in cpu_info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
