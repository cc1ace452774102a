"""`wisp replay --policy`: replay recorded requests in virtual time under other policies and drafts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from typing import cast, get_args

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from services.scheduler.core.dispatch import SchedulingRules
from services.scheduler.core.policies import POLICIES
from services.scheduler.settings import SchedulerSettings
from services.tools.cli.core.suite_view import short
from services.tools.cli.core.text_parts import counted
from services.tools.cli.replay.recordings import print_notes
from services.tools.cli.terminal import err, out, print_fields
from services.tools.replayer.core.performance import Performance, recorded_performance
from services.tools.replayer.core.recording import Recording, RecordingError
from services.tools.replayer.core.sessions import read_sessions
from services.tools.replayer.core.traffic import RecordedTraffic, recorded_traffic
from services.tools.replayer.core.what_if import DraftPlan, ReplayedRule, what_if
from shared.errors import SettingsError
from shared.runtime.settings_loading import problems_of

RECORDED = "recorded"
CHANGED = 8
"""Sessions named whose SLO attainment a policy changes."""


def compare_policies(
    recording: Recording, policies: list[str], stop_rule: str | None, draft_length: int | None, *, as_json: bool
) -> None:
    """Print figures of the recording, of the live policy in virtual time, and of each given policy.

    Raises RecordingError and SettingsError.
    """
    found = recorded_traffic(recording)
    print_notes(recording)
    if not found.requests or not found.heartbeats or not found.policy:
        raise RecordingError(
            "nothing to replay: the recording needs at least one whole session and a verifier's heartbeat "
            f"({_reasons(found) or 'it has no session'})"
        )
    live = found.policy
    rule = _known(stop_rule or "recorded", get_args(ReplayedRule), "stop rule")
    drafting = DraftPlan(cast("ReplayedRule", rule), draft_length)
    runs: dict[str, tuple[str, DraftPlan]] = {f"{live} again": (live, DraftPlan())}
    for policy in policies or [live]:
        runs[_called(policy, drafting)] = (policy, drafting)
    lives = read_sessions(recording.entries())
    columns = {RECORDED: recorded_performance(lives[request.generate.session] for request in found.requests)}
    for name, (policy, drafts) in runs.items():
        columns[name] = what_if(found, _rules(policy), drafts)
    if as_json:
        runs_by_name = {name: asdict(figures) for name, figures in columns.items()}
        print_fields(out, {"left_out": found.left_out, "runs": runs_by_name})
        return
    out.print(_table(columns))
    for line in _changes(columns, f"{live} again"):
        out.print(line, soft_wrap=True)
    if found.left_out:
        err.print(Text(f"left out: {_reasons(found)}", "dim"), soft_wrap=True)
    if not found.cost_models:
        err.print(Text("no cost model is in the recording: batch times are rough estimates", "yellow"), soft_wrap=True)
    if recording.redacted:
        err.print(
            Text("the recording has no text, so trimmed tokens count as wrong", "yellow"),
            soft_wrap=True,
        )


def _called(policy: str, drafting: DraftPlan) -> str:
    name = policy
    if drafting.rule != "recorded":
        name += f", {drafting.rule}"
    if drafting.longest is not None:
        name += f", drafts of at most {drafting.longest}" if drafting.longest else ", no drafts"
    return name


def _known(name: str, names: Collection[str], what: str) -> str:
    if name not in names:
        more = ""
        if what == "stop rule":
            more = "; for fixed use --draft-length; the inputs of entropy and predictor are not recorded"
        raise SettingsError(f"no {what} {name!r} can be replayed: {', '.join(names)}{more}")
    return name


def _rules(policy: str) -> SchedulingRules:
    """Return the policy with the schedulers' settings from the environment. Raises SettingsError."""
    _known(policy, POLICIES, "policy")
    try:
        return SchedulerSettings(policy=policy).rules  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError("\n".join(problems_of(error, options=False))) from None


def _reasons(found: RecordedTraffic) -> str:
    return "; ".join(f"{counted(count, 'session')}, as {reason}" for reason, count in found.left_out.most_common())


def _table(columns: Mapping[str, Performance]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption="times in ms", caption_justify="left")
    table.add_column()
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    classes = sorted({name for figures in columns.values() for name in figures.attained_by_class})
    rows: list[tuple[str, Callable[[Performance], str]]] = [
        ("requests served whole", lambda f: f"{f.complete} of {f.requests}"),
        ("SLO attained", lambda f: _share(f.attained, f.promised)),
    ]
    if len(classes) > 1:
        rows += [(f"  {name}", partial(_attained, name)) for name in classes]
    rows += [
        ("goodput, tokens/s", lambda f: f"{f.goodput:.1f}"),
        ("throughput, tokens/s", lambda f: f"{f.throughput:.1f}"),
        ("TTFT, median", lambda f: _ms(f.ttft_p50_ms)),
        ("TTFT, 95th percentile", lambda f: _ms(f.ttft_p95_ms)),
        ("TPOT, median", lambda f: _ms(f.tpot_p50_ms)),
        ("TPOT, 95th percentile", lambda f: _ms(f.tpot_p95_ms)),
        ("wait for a batch, mean", lambda f: _ms(f.wait_mean_ms)),
        ("wait, 95th percentile", lambda f: _ms(f.wait_p95_ms)),
        ("rounds", lambda f: f"{f.rounds:,}"),
        ("batches", lambda f: f"{f.batches:,}"),
        ("jobs per batch", lambda f: f"{f.jobs_per_batch:.2f}"),
        ("draft tokens", lambda f: f"{f.drafted:,}"),
        ("  verified", lambda f: f"{f.verified:,}"),
        ("  accepted", lambda f: f"{f.accepted:,}"),
    ]
    for title, value in rows:
        table.add_row(title, *(value(figures) for figures in columns.values()))
    return table


def _changes(columns: Mapping[str, Performance], yardstick: str) -> list[Text]:
    """Name the sessions whose SLO attainment differs between a policy and the live one, both in virtual time."""
    before = columns[yardstick].sessions
    lines = []
    for name, figures in columns.items():
        for now, verb in ((True, "would attain"), (False, "would miss")):
            changed = [
                short(session) for session, attained in figures.sessions.items() if attained == now != before[session]
            ]
            if name not in (RECORDED, yardstick) and changed:
                more = f" and {len(changed) - CHANGED} more" if len(changed) > CHANGED else ""
                lines.append(Text(f"{name}: {', '.join(changed[:CHANGED])}{more} {verb} the SLO"))
    return lines


def _attained(name: str, figures: Performance) -> str:
    return _share(*figures.attained_by_class.get(name, (0, 0)))


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else "-"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
