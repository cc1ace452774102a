"""A suite's snapshot as terminal text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.tools.cli.core.suite_snapshot import (
    BatchView,
    JobView,
    PoolView,
    Rates,
    SchedulerView,
    SuiteSnapshot,
    VerifierView,
)
from services.tools.cli.core.suite_watch import LONG_MS, SHORT_MS
from services.tools.cli.core.text_parts import printable
from shared.broker.topology import pool_in_words

JOBS_SHOWN = 6
LEFT_SHOWN = 3
NAME_WIDTH = 24


def suite_view(snapshot: SuiteSnapshot, namespace: str, note: str | None) -> RenderableType:
    """Render the screen. note: the current problem with the connection, if any."""
    parts: list[RenderableType] = [_line(f"wisp top: {namespace}", "bold")]
    if note:
        parts.append(Text(note, "yellow"))
    if snapshot.empty:
        seconds = snapshot.observed_ms / 1000
        parts.append(
            Text(
                f"No message from a scheduler or verifier in namespace {namespace} for {seconds:.0f} s. Start a suite "
                "with `make serve` or `wisp up`, or choose another namespace or broker (--namespace, --amqp-url)."
            )
        )
        return Group(*parts)
    parts += [
        _scheduler(snapshot.scheduler),
        _line(
            f"tokens/s {_windows(snapshot)}: {_rates(snapshot, snapshot.throughput)}; goodput "
            f"{_rates(snapshot, snapshot.goodput)}; drafts accepted "
            + ("-" if snapshot.acceptance is None else f"{snapshot.acceptance:.0%}")
        ),
        Text(),
        _verifiers(snapshot.verifiers),
        *_mixture(snapshot.mixture),
        *map(_pool, snapshot.pools),
        Text(),
        _classes(snapshot),
    ]
    if snapshot.ends:
        ends = ", ".join(f"{one.service_class} {one.reason} {one.count}" for one in snapshot.ends)
        parts.append(Text(printable(f"ends in {_seconds(LONG_MS, snapshot)} s: {ends}")))
    parts.append(Text())
    parts += _batches(snapshot.batches) or [Text(f"no batch in {_seconds(LONG_MS, snapshot)} s")]
    return Group(*parts)


def _seconds(window_ms: float, snapshot: SuiteSnapshot) -> str:
    """Return the seconds of a window that were observed."""
    return f"{max(1.0, min(window_ms, snapshot.observed_ms)) / 1000:.0f}"


def _windows(snapshot: SuiteSnapshot) -> str:
    short, long = _seconds(SHORT_MS, snapshot), _seconds(LONG_MS, snapshot)
    return f"in {short} s" if short == long else f"in {short} and {long} s"


def _rates(snapshot: SuiteSnapshot, rates: Rates) -> str:
    if _seconds(SHORT_MS, snapshot) == _seconds(LONG_MS, snapshot):
        return _rate(rates.short)
    return f"{_rate(rates.short)}, {_rate(rates.long)}"


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def _scheduler(scheduler: SchedulerView | None) -> Text:
    if scheduler is None:
        return _line("no round yet: a scheduler publishes its load from its first round on")
    if not scheduler.alive:
        return _line(f"scheduler {scheduler.name} silent for {scheduler.silent_ms / 1000:.0f} s")
    return _line(
        f"policy {scheduler.policy or '-'}, utilization {scheduler.utilization:.0%}, "
        f"price {scheduler.price_ms:.2f} ms/token, {scheduler.pending} pending, queue {scheduler.queue_ms:.0f} ms"
    )


def _table(*columns: tuple[str, bool]) -> Table:
    """Make a table. columns: title, and whether the column holds numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title, number in columns:
        table.add_column(title, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _verifiers(verifiers: Iterable[VerifierView]) -> Table:
    """Columns: runs: sessions in runs; busy: share of time in steps; size: jobs per batch, with the runs beside them;
    ms/pred: time of the last batch and its prediction; ratio: median of time/pred.
    """
    table = _table(
        ("verifier", False),
        ("state", False),
        ("cache", True),
        ("sess", True),
        ("runs", True),
        ("busy", True),
        ("jobs/s", True),
        ("size", True),
        ("ms/pred", True),
        ("ratio", True),
    )
    for one in verifiers:
        state = "draining" if one.draining else "alive"
        if not one.alive:
            state = f"silent {one.silent_ms / 1000:.0f} s"
        last = "-"
        if one.measured_ms is not None and one.predicted_ms is not None:
            last = f"{one.measured_ms:.0f}/{one.predicted_ms:.0f}"
        table.add_row(
            _clipped(one.name),
            state,
            f"{one.cache_used:.0%}",
            str(one.sessions),
            str(one.runs),
            f"{one.busy:.0%}",
            _rate(one.jobs_per_s),
            _number(one.batch_jobs, 1),
            last,
            _number(one.ratio_p50, 2),
        )
    return table


def _mixture(mixture: Mapping[str, Sequence[str]]) -> Iterator[Text]:
    if mixture:
        yield _line("mixed fleet: sessions stay with verifiers of one arithmetic", "yellow")
    for arithmetic, names in mixture.items():
        yield _line(f"  {', '.join(map(_clipped, names))}: {arithmetic}")


def _pool(one: PoolView) -> Text:
    """Describe a pool's drafters, and its sessions without a drafter."""
    pool, undrafted = pool_in_words(one.pool), _sessions(one.undrafted)
    if not one.drafters:
        return _line(f"{pool}: no drafter, a scheduler stands in for {undrafted}", "yellow")
    drafters = "1 drafter" if one.drafters == 1 else f"{one.drafters} drafters"
    more = f"; a scheduler stands in for {undrafted} until a drafter has room" if one.undrafted else ""
    return _line(f"{pool}: {drafters}, {_sessions(one.sessions)}{_learned(one)}{more}")


def _learned(one: PoolView) -> str:
    """Describe the drafts that learn from their sessions."""
    if one.learned_acceptance is None or one.shipped_acceptance is None:
        return ""
    if not one.learned:
        return f", drafts learning (shipped: {one.shipped_acceptance:.0%} accepted)"
    return f", {one.learned} learned: {one.learned_acceptance:.0%} accepted, shipped {one.shipped_acceptance:.0%}"


def _sessions(count: int) -> str:
    return "1 session" if count == 1 else f"{count} sessions"


def _classes(snapshot: SuiteSnapshot) -> Table:
    table = _table(
        ("class", False),
        ("sessions", True),
        ("waiting", True),
        ("queue ms", True),
        ("slack ms", True),
        ("attained", True),
        ("refused", True),
    )
    for one in snapshot.classes:
        attained = "-" if one.attainment is None else f"{one.attained}/{one.promised} {one.attainment:.0%}"
        table.add_row(
            _clipped(one.service_class),
            str(one.sessions),
            str(one.waiting),
            _number(one.queue_ms),
            _number(one.slack_ms),
            attained,
            str(one.refused),
        )
    return table


def _batches(batches: Iterable[BatchView]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for batch in batches:
        took = "under way" if batch.measured_ms is None else f"{batch.measured_ms:.0f} ms"
        lines.append(
            _line(
                f"batch of {len(batch.jobs)}{_beside(batch)} on {_clipped(batch.verifier or '?')}, "
                f"{batch.age_ms / 1000:.1f} s ago: {took}, predicted {batch.predicted_ms:.0f}; "
                f"{batch.waiting} left in the queue",
                "bold",
            )
        )
        lines += [_line(f"  {_job(job)}") for job in batch.jobs[:JOBS_SHOWN]]
        if (more := len(batch.jobs) - JOBS_SHOWN) > 0:
            lines.append(_line(f"  and {more} more jobs"))
        lines += [_line(f"  left out {short(session)}: {why}") for session, why in batch.left_out[:LEFT_SHOWN]]
        if batch.left_out and (more := batch.waiting - min(len(batch.left_out), LEFT_SHOWN)) > 0:
            lines.append(_line(f"  and {more} more left out"))
    return lines


def _beside(batch: BatchView) -> str:
    return f" beside {batch.runs} in runs" if batch.runs else ""


def _job(job: JobView) -> str:
    if job.prefill_to is not None:
        what = f"prompt to {job.prefill_to}"
    else:
        what = f"draft {job.draft}" + (f" of {job.drafted}" if job.draft < job.drafted else "")
    slack = "" if job.slack_ms is None else f" (slack {job.slack_ms:.0f} ms)"
    return (
        f"{short(job.session)} {_clipped(job.service_class)}, {what}, queued {job.queue_ms:.0f} ms: {job.reason}{slack}"
    )


def short(session_id: str) -> str:
    """Shorten a session id for a line: equal ids stay equal, and different ones nearly always differ."""
    name, dot, index = session_id.rpartition("-")[2].partition(".")
    return f"{name[:8]}{dot}{index}"


def _clipped(name: str) -> str:
    """Keep a name's end, where names of instances differ."""
    return name if len(name) <= NAME_WIDTH else f"…{name[1 - NAME_WIDTH :]}"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
