"""The report of a campaign: tables, a file of results, a file of every request, a picture."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from services.tools.bench.load.campaign import Campaign
from services.tools.bench.load.core.record import RequestRecord
from services.tools.bench.load.core.results import (
    LoadResults,
    capacity_table,
    draft_table,
    goodput_table,
    notes,
    paired_table,
    promise_table,
    speed_table,
)
from services.tools.bench.support.report import conclude as conclude_record
from services.tools.bench.support.report import table, written
from services.tools.local.folder import state_folder
from shared.errors import SettingsError

BIG = 4 << 20
"""Bytes of records above which the file is compressed."""
BASELINES = (
    "centralized and colocated have no drafters: a request takes the uplink of its hardware profile once, colocated "
    "drafts on the server's own thread, and admission predicts nothing; in every arm, text counts when it leaves the "
    "server"
)
"""A note on the figures of the baselines."""


def print_tables(results: LoadResults, console: Console) -> None:
    """Print all tables of results."""
    console.print()
    console.print(table("promises kept", *promise_table(results.by_arm)))
    console.print(table("speed by class", *speed_table(results.by_arm)))
    columns, rows = draft_table(results.by_arm)
    if rows:
        console.print(table("drafts and batches", columns, rows))
    columns, rows = paired_table(results)
    if rows:
        console.print(table("with the same requests, median of the repeats", columns, rows))
    console.print(table("highest goodput, at any n", *goodput_table(results)))
    if results.aims:
        console.print(table("capacity", *capacity_table(results)))


def conclude(campaign: Campaign, facts: Mapping[str, Any], name: str, console: Console) -> None:
    """Print all tables and write all files."""
    plan, results = campaign.plan, campaign.results
    print_tables(results, console)
    explained = notes(results, plan.search.tolerance if plan.search else None)
    if any(arm.serving != "wisp" for arm in plan.arms):
        explained.append(BASELINES)
    record = {
        "facts": dict(facts),
        "notes": explained,
        "workload": plan.workload.model_dump(mode="json"),
        "capacities": {
            arm: [one.model_dump() for one in capacities] for arm, capacities in results.capacities().items()
        },
        "ratios": results.ratios(),
        "results": results.model_dump(mode="json"),
    }
    path = conclude_record(console, name, record)
    written(console, _write_records(path, campaign.records), _plot(results, path))


def replot(name: str, console: Console) -> None:
    """Draw the picture of an earlier run again. Raises SettingsError if there is none."""
    path = state_folder() / "results" / f"{name}.json"
    try:
        results = LoadResults.model_validate(json.loads(path.read_text("utf-8"))["results"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise SettingsError(
            f"{path} holds no results of this benchmark ({error}); run `wisp bench load` first"
        ) from error
    if not results.points:
        raise SettingsError(f"{path} holds no points; run `wisp bench load` again")
    written(console, _plot(results, path))


def _plot(results: LoadResults, path: Path) -> Path:
    from services.tools.bench.load.plot import plot

    picture = path.with_suffix(".svg")
    plot(results, picture)
    return picture


def _write_records(path: Path, records: Sequence[tuple[str, int, int, RequestRecord]]) -> Path:
    """Write one JSON object per request beside the results; return the file."""
    data = "".join(
        json.dumps({"arm": arm, "sessions": sessions, "repeat": repeat, **record.model_dump(mode="json")}) + "\n"
        for arm, sessions, repeat, record in records
    ).encode()
    plain = path.with_name(f"{path.stem}-requests.jsonl")
    packed = plain.with_suffix(".jsonl.gz")
    chosen, other = (packed, plain) if len(data) >= BIG else (plain, packed)
    chosen.write_bytes(gzip.compress(data) if chosen is packed else data)
    other.unlink(missing_ok=True)  # of an earlier run
    return chosen
