"""A snapshot as text of the terminal. Pure: it decides words and columns, and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.tools.cli.core.suite_snapshot import BatchView, JobView, SchedulerView, SuiteSnapshot, VerifierView
from services.tools.cli.core.text_parts import printable

JOBS_SHOWN = 6
LEFT_SHOWN = 3
NAME_WIDTH = 24


def suite_view(snapshot: SuiteSnapshot, namespace: str, note: str | None) -> RenderableType:
    """The screen. note: what is wrong with the connection, if anything is."""
    parts: list[RenderableType] = [_line(f"wisp top: {namespace}", "bold")]
    if note:
        parts.append(Text(note, "yellow"))
    if snapshot.empty:
        seconds = snapshot.observed_ms / 1000
        parts.append(
            Text(
                f"Nothing of a suite in namespace {namespace} for {seconds:.0f} s: no scheduler and no verifier "
                "speaks. Start one with `make serve` or `wisp up`, or name another namespace or broker (--namespace, "
                "--amqp-url)."
            )
        )
        return Group(*parts)
    parts += [
        _scheduler(snapshot.scheduler),
        _line(
            f"tokens/s in 10 and 60 s: {_rate(snapshot.throughput.short)}, {_rate(snapshot.throughput.long)}; goodput "
            f"{_rate(snapshot.goodput.short)}, {_rate(snapshot.goodput.long)}; drafts accepted "
            + ("-" if snapshot.acceptance is None else f"{snapshot.acceptance:.0%}")
        ),
        Text(),
        _verifiers(snapshot.verifiers),
        Text(),
        _classes(snapshot),
    ]
    if snapshot.ends:
        told = ", ".join(f"{one.service_class} {one.reason} {one.count}" for one in snapshot.ends)
        parts.append(Text(printable(f"ends in the last minute: {told}")))
    parts.append(Text())
    parts += _batches(snapshot.batches)
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def _scheduler(told: SchedulerView | None) -> Text:
    if told is None:
        return _line("no scheduler is active: it speaks when it has seen a round")
    if not told.alive:
        return _line(f"scheduler {told.name} silent for {told.silent_ms / 1000:.0f} s")
    return _line(
        f"policy {told.policy or '-'}, utilization {told.utilization:.0%}, price {told.price_ms:.2f} ms/token, "
        f"{told.pending} waiting, queue {told.queue_ms:.0f} ms"
    )


def _table(*columns: tuple[str, bool]) -> Table:
    """Columns by title, and whether they hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title, number in columns:
        table.add_column(title, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _verifiers(verifiers: Iterable[VerifierView]) -> Table:
    """size: jobs in a batch; ms/pred: time of the last batch and its prediction; ratio: median of these two."""
    table = _table(
        ("verifier", False),
        ("state", False),
        ("cache", True),
        ("sess", True),
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
            _rate(one.jobs_per_s),
            _number(one.batch_jobs, 1),
            last,
            _number(one.ratio_p50, 2),
        )
    return table


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
        attained = "-" if one.attainment is None else f"{one.attained}/{one.ended} {one.attainment:.0%}"
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
                f"batch of {len(batch.jobs)} on {_clipped(batch.verifier or '?')}, "
                f"{batch.age_ms / 1000:.1f} s ago: {took}, predicted {batch.predicted_ms:.0f}; {batch.waiting} wait on",
                "bold",
            )
        )
        lines += [_line(f"  {_job(job)}") for job in batch.jobs[:JOBS_SHOWN]]
        if (more := len(batch.jobs) - JOBS_SHOWN) > 0:
            lines.append(_line(f"  and {more} more jobs"))
        lines += [_line(f"  left out {short(session)}: {why}") for session, why in batch.left_out[:LEFT_SHOWN]]
        if batch.left_out and (more := batch.waiting - min(len(batch.left_out), LEFT_SHOWN)) > 0:
            lines.append(_line(f"  and {more} more left out"))
    return lines or [Text("no batch in the last minute")]


def _job(job: JobView) -> str:
    if job.prefill_to is not None:
        what = f"prompt to {job.prefill_to}"
    else:
        what = f"draft {job.draft}" + (f" of {job.drafted}" if job.draft < job.drafted else "")
    slack = "" if job.slack_ms is None else f" (slack {job.slack_ms:.0f} ms)"
    return (
        f"{short(job.session)} {_clipped(job.service_class)}, {what}, queued {job.queue_ms:.0f} ms: {job.reason}{slack}"
    )


def short(session: str) -> str:
    """A session's name, short enough for a line; equal names stay equal, different ones nearly always differ."""
    name, dot, index = session.rpartition("-")[2].partition(".")
    return f"{name[:8]}{dot}{index}"


def _clipped(name: str) -> str:
    """A name's end, which is where names of instances differ."""
    return name if len(name) <= NAME_WIDTH else f"…{name[1 - NAME_WIDTH :]}"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
